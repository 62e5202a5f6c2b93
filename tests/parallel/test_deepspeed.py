"""DeepSpeed's engine, at every ZeRO stage and layout, trains like one plain process: torch AdamW on the whole model.

Every parameter is split by ZeRO-3 here, however small.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import run_distributed
from tests.parallel.layouts import MODELS
from tests.parallel.test_engine import CONFIG, STEPS, learning_rate, one_process, rows
from tests.training.jobs import SIZES, TEXT, Run, corpus, finish
from titans_dist.config import Config, ConfigError, ParallelConfig, validate

pytest.importorskip("deepspeed")


def rest(*values: Any, id: str | None = None) -> Any:
    """Parameters that only the whole matrix has."""
    return pytest.param(*values, id=id, marks=pytest.mark.matrix)


ALL_MODELS = [
    (zero, name) if (zero, name) in {(3, "mac"), (2, "mal")} else rest(zero, name)
    for zero in (1, 2, 3)
    for name in MODELS
]


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Once, before ranks are forked: what every rank would import for three seconds."""
    from titans_dist.parallel.deepspeed_engine import import_deepspeed

    import_deepspeed(torch.device("cpu"))
    for name in ("torch._dynamo", "torch._inductor.compile_fx", "deepspeed.runtime.zero.muon.muon_optimizer"):
        importlib.import_module(name)


def settings(zero: int, layout: dict[str, Any] | None = None, base: Config = CONFIG, **training: Any) -> Config:
    """CONFIG on DeepSpeed; tensor=2 and the like in `layout`."""
    changed = dataclasses.replace(base.training, engine="deepspeed", zero_stage=zero, **training)
    return dataclasses.replace(base, parallel=ParallelConfig(**layout or {}), training=changed)


def build(config: Config) -> Any:
    """This rank's engine, of either kind."""
    from megatron.core import parallel_state

    from titans_dist.parallel import cpu, deepspeed_engine
    from titans_dist.parallel.engines import build_engine
    from titans_dist.parallel.processes import make_groups

    cpu.install()
    if not parallel_state.model_parallel_is_initialized():
        make_groups(config.parallel)
    deepspeed_engine.KEPT_WHOLE = 0
    return build_engine(config, torch.device("cpu"))


def share(engine: Any, step: int, micro_batch: int) -> list[dict[str, Tensor]]:
    """This rank's micro-batches of a step."""
    own = rows(step).chunk(engine.data_size)[engine.data_rank]
    return [{"tokens": part} for part in own.split(micro_batch)]


def parameters(engine: Any) -> dict[str, tuple[Tensor, int | None]]:
    """Name -> this rank's whole value and the dimension along which tensor-parallel ranks split it. Collective."""
    return {
        name: (engine._values.get(value, None), value.partition_dim if value.tensor_model_parallel else None)
        for name, value in engine.stages[0].model.named_parameters()
    }


def state(engine: Any) -> list[Tensor]:
    """Parameters, masters and moments. Collective."""
    values = engine.stages[0].model.parameters()
    return [engine._values.get(v, what).clone() for v in values for what in (None, "param", "exp_avg", "exp_avg_sq")]


def train(rank: int, world: int, config: Config) -> tuple[Any, ...]:
    from megatron.core import parallel_state

    engine = build(config)
    history = []
    for step in range(STEPS):
        result = engine.step(share(engine, step, config.training.micro_batch_size))
        history.append((result.loss, result.grad_norm))
        assert result.lr == pytest.approx(learning_rate(step + 1, config))
    return history, parameters(engine), parallel_state.get_tensor_model_parallel_rank()


def same_curve(found: list[tuple[float, float]], wanted: list[tuple[float, float]], norms: float = 1e-4) -> None:
    for (loss, norm), (wanted_loss, wanted_norm) in zip(found, wanted, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=2e-6)
        assert norm == pytest.approx(wanted_norm, rel=norms)


def check(world: int, config: Config, wanted: Any, norms: float = 1e-4) -> None:
    """Losses, gradient norms and parameters on every rank are those of one process."""
    for history, parts, tensor_rank in run_distributed(train, world, config):
        same_curve(history, wanted[0], norms)
        assert set(parts) == set(wanted[1])
        for name, (value, axis) in parts.items():
            whole = wanted[1][name]
            right = whole if axis is None else whole.chunk(config.parallel.tensor, axis)[tensor_rank]
            torch.testing.assert_close(value, right, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def plain() -> Any:
    return one_process()


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_every_zero_stage_equals_one_process(zero: int, plain: Any) -> None:
    check(2, settings(zero), plain)


@pytest.mark.parametrize("zero", [1, rest(2), 3])
def test_offload_equals_one_process(zero: int, plain: Any) -> None:
    check(2, settings(zero, offload=True), plain)


@pytest.mark.parametrize(
    ("zero", "sequence"), [(0, True), (1, True), (2, True), (3, True), rest(1, False), rest(3, False)]
)
def test_tensor_parallel_equals_one_process(zero: int, sequence: bool, plain: Any) -> None:
    check(4, settings(zero, {"tensor": 2, "sequence": sequence}), plain)


@pytest.mark.parametrize(
    ("zero", "layout", "world"),
    [
        (1, {"context": 2}, 2),
        rest(0, {"context": 2}, 2),
        rest(2, {"context": 2, "tensor": 2}, 4),
        rest(3, {"context": 2}, 2),
        rest(3, {"context": 2, "context_mode": "ring"}, 2),
        rest(3, {"context": 2}, 4),
    ],
)
def test_context_parallel_equals_one_process(zero: int, layout: dict[str, Any], world: int) -> None:
    memory = dataclasses.replace(CONFIG.model.memory, chunk_size=4)  # shares of 12 tokens hold whole chunks
    base = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, memory=memory))
    check(world, settings(zero, layout, base=base), one_process(base))


@pytest.mark.parametrize("recompute", ["none", rest("full")])
def test_recomputing_with_split_parameters_changes_nothing(recompute: str, plain: Any) -> None:
    check(2, settings(3, recompute=recompute), plain)


@pytest.mark.parametrize(
    ("micro_batch", "zero", "offload"),
    [
        (1, 2, False),
        (1, 3, False),
        (1, 1, True),
        rest(1, 1, False),
        rest(4, 1, True),
        rest(4, 2, True),
        rest(4, 3, True),
    ],
)
def test_a_step_is_the_same_in_any_number_of_micro_batches(
    micro_batch: int, zero: int, offload: bool, plain: Any
) -> None:
    check(2, settings(zero, offload=offload, micro_batch_size=micro_batch), plain)


@pytest.mark.parametrize("zero", [rest(0), 2, rest(3)])
def test_without_clipping(zero: int) -> None:
    base = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, clip_grad=0.0))
    check(2, settings(zero, base=base), one_process(base))


@pytest.mark.parametrize(("zero", "name"), ALL_MODELS)
def test_every_model_equals_one_process(zero: int, name: str) -> None:
    base = dataclasses.replace(CONFIG, model=dataclasses.replace(MODELS[name], num_layers=2))
    if name == "mac":  # which else leaves its start so fast that rounding grows a thousandfold in each step
        base = dataclasses.replace(base, optimizer=dataclasses.replace(CONFIG.optimizer, lr=1e-4))
    check(2, settings(zero, base=base), one_process(base), norms=1e-3 if name == "mac" else 1e-4)


@pytest.mark.parametrize(("zero", "offload"), [(1, False), (3, False), rest(1, True), rest(2, False), rest(3, True)])
def test_bfloat16_follows_float32_roughly(zero: int, offload: bool, plain: Any) -> None:
    def in_bfloat16(rank: int, world: int) -> Any:
        engine = build(settings(zero, precision="bfloat16", offload=offload))
        losses = [engine.step(share(engine, step, 2)).loss for step in range(STEPS)]
        values = list(engine.stages[0].model.parameters())
        masters = [engine._values.get(value, "param") for value in values]
        kept = max(float((engine._values.get(v, None) - m).abs().max()) for v, m in zip(values, masters, strict=True))
        return losses, {v.dtype for v in values}, {m.dtype for m in masters}, kept

    for losses, dtypes, masters, kept in run_distributed(in_bfloat16, 2):
        assert (dtypes, masters) == ({torch.bfloat16}, {torch.float32})
        assert losses == pytest.approx([loss for loss, _ in plain[0]], rel=1e-2)
        assert 0 < kept < 1e-2  # the masters have digits that the parameters have not


# Steps that are not made


def infinite_gradient(engine: Any, rank: int) -> Callable[[], None]:
    """On rank 1, from now on; returns what ends it."""

    def spoil(gradient: Tensor) -> Tensor:
        return gradient * math.inf if rank == 1 else gradient

    handle: Any = engine.stages[0].model.blocks[1].mlp_norm.weight.register_hook(spoil)
    end: Callable[[], None] = handle.remove
    return end


def infinite_loss(engine: Any, rank: int) -> Callable[[], None]:
    """On rank 1, whose gradients stay finite."""
    whole = engine._forward
    engine._forward = lambda number, batch: whole(number, batch) + (math.inf if rank == 1 else 0.0)
    return lambda: delattr(engine, "_forward")


@pytest.mark.parametrize(
    ("zero", "training"),
    [
        (0, {}),
        (1, {"precision": "bfloat16"}),
        (2, {"offload": True}),
        (3, {}),
        rest(1, {}),
        rest(1, {"offload": True}),
        rest(2, {"precision": "bfloat16"}),
        rest(3, {"precision": "bfloat16", "offload": True}),
    ],
)
def test_what_is_not_finite_changes_nothing(zero: int, training: dict[str, Any]) -> None:
    def spoiled(rank: int, world: int) -> Any:
        engine, untouched = (build(settings(zero, **training)) for _ in range(2))
        for one in (engine, untouched):
            one.step(share(one, 0, 2))
        for spoil in (infinite_gradient, infinite_loss):
            before = state(engine)
            end = spoil(engine, rank)
            result = engine.step(share(engine, 1, 2))
            end()
            assert not (math.isfinite(result.loss) and math.isfinite(result.grad_norm))
            assert engine._values.adam_step == 1
            for old, new in zip(before, state(engine), strict=True):
                assert torch.equal(old, new)
        return [one.step(share(one, 1, 2)) for one in (engine, untouched)]

    for found, wanted in run_distributed(spoiled, 2):
        assert (found.loss, found.grad_norm) == (wanted.loss, wanted.grad_norm)


@pytest.mark.parametrize("zero", [0, rest(2), 3])
def test_the_culprit_is_named(zero: int) -> None:
    def named(rank: int, world: int) -> str:
        engine = build(settings(zero))
        infinite_gradient(engine, rank)
        batches = share(engine, 0, 2)
        assert not math.isfinite(engine.step(batches).grad_norm)
        return engine.culprit(batches)  # type: ignore[no-any-return]

    assert set(run_distributed(named, 2)) == {
        "every output is finite; backward from the loss, the first gradient that is not is that of "
        "blocks.1.mlp_norm.weight in process 1"
    }


# Checkpoints


def first_half(rank: int, world: int, config: Config, folder: Path) -> None:
    from titans_dist.checkpoint.sharded import save
    from titans_dist.checkpoint.store import Store

    engine = build(config)
    for step in range(2):
        engine.step(share(engine, step, 2))
    assert save(Store(folder), 2, engine.sharded_state(), {}, keep=2).error is None


def second_half(rank: int, world: int, config: Config, folder: Path) -> list[tuple[float, float]]:
    from titans_dist.checkpoint.sharded import load
    from titans_dist.checkpoint.store import Store

    engine = build(config)
    engine.load(load(Store(folder), 2, engine.sharded_state(is_loading=True)), 2)
    results = [engine.step(share(engine, step, 2)) for step in range(2, STEPS)]
    assert [result.lr for result in results] == pytest.approx([learning_rate(step + 1) for step in range(2, STEPS)])
    return [(result.loss, result.grad_norm) for result in results]


MEGATRON = dataclasses.replace(CONFIG, parallel=ParallelConfig())


@pytest.mark.parametrize(
    ("before", "after", "worlds"),
    [
        pytest.param(settings(1), settings(3), (2, 2), id="1-3"),
        pytest.param(settings(3), settings(2, {"tensor": 2}), (2, 2), id="3-2_tp2"),
        pytest.param(settings(2), MEGATRON, (2, 2), id="2-megatron"),
        pytest.param(MEGATRON, settings(1), (1, 2), id="megatron-1"),
        rest(settings(2, {"tensor": 2}), settings(3, offload=True), (4, 1), id="2_tp2-3_offload"),
        rest(settings(0), settings(1, {"context": 2}), (2, 2), id="0-1_cp2"),
        rest(settings(1, offload=True), settings(0), (2, 1), id="1_offload-0"),
        rest(settings(3), MEGATRON, (2, 2), id="3-megatron"),
        rest(MEGATRON, settings(3), (2, 4), id="megatron-3"),
        rest(MEGATRON, settings(0), (2, 1), id="megatron-0"),
    ],
)
def test_a_run_goes_on_with_another_stage_layout_or_engine(
    before: Config, after: Config, worlds: tuple[int, int], plain: Any, tmp_path: Path
) -> None:
    run_distributed(first_half, worlds[0], before, tmp_path)
    for history in run_distributed(second_half, worlds[1], after, tmp_path):
        same_curve(history, plain[0][2:])


@pytest.mark.parametrize(("before", "after"), [(1, 3), rest(2, 2), rest(3, 1)])
def test_bfloat16_goes_on_with_its_masters(before: int, after: int, tmp_path: Path) -> None:
    """Bit by bit as it was saved, whichever stage had it."""

    def saved(rank: int, world: int) -> list[Tensor]:
        from titans_dist.checkpoint.sharded import save
        from titans_dist.checkpoint.store import Store

        engine = build(settings(before, precision="bfloat16"))
        for step in range(2):
            engine.step(share(engine, step, 2))
        assert save(Store(tmp_path), 2, engine.sharded_state(), {}, keep=2).error is None
        return state(engine)

    def loaded(rank: int, world: int) -> list[Tensor]:
        from titans_dist.checkpoint.sharded import load
        from titans_dist.checkpoint.store import Store

        engine = build(settings(after, precision="bfloat16"))
        engine.load(load(Store(tmp_path), 2, engine.sharded_state(is_loading=True)), 2)
        assert engine._values.adam_step == 2
        return state(engine)

    for old, new in zip(run_distributed(saved, 2)[0], run_distributed(loaded, 2)[1], strict=True):
        assert old.dtype == new.dtype and torch.equal(old, new)


def test_values_come_back_where_shares_are_padded() -> None:
    """Three ranks divide hardly any parameter evenly."""

    def differences(rank: int, world: int) -> list[str]:
        engine, found = build(settings(3, global_batch_size=6)), []
        for name, value in engine.stages[0].model.named_parameters():
            shape = engine._values.shape(value)
            whole = torch.arange(shape.numel(), dtype=torch.float32).view(shape)
            for what in (None, "param", "exp_avg"):
                engine._values.set(value, what, whole)
                if not torch.equal(engine._values.get(value, what), whole):
                    found.append(f"{name} {what}")
        return found

    assert run_distributed(differences, 3) == [[], [], []]


# What else an engine does


def packed_curve(rank: int, world: int, config: Config) -> list[tuple[float, float]]:
    """Documents that are not the same on the ranks: after the first token, or with a carried state ever, rank 1's rows
    have none."""
    engine = build(config)
    found = []
    for step in range(3):
        batches = share(engine, step, 2)
        for batch in batches:
            starts = torch.rand(batch["tokens"][:, 1:].shape, generator=torch.Generator().manual_seed(step)) < 0.2
            starts &= torch.tensor(rank == 0)
            starts[:, 0] = step == 0 or rank == 0 or not config.training.carry_state
            batch["starts"] = starts
        result = engine.step(batches)
        found.append((result.loss, result.grad_norm))
    return found


@pytest.mark.parametrize(("zero", "offload"), [(1, False), rest(0, False), rest(1, True)])
def test_carried_states_train_as_with_the_other_engine(zero: int, offload: bool) -> None:
    """Where no document begins, memories' beginnings have no gradient."""
    megatron = dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, carry_state=True))
    wanted = run_distributed(packed_curve, 2, megatron)[0]
    for found in run_distributed(packed_curve, 2, settings(zero, carry_state=True, offload=offload)):
        same_curve(found, wanted)


@pytest.mark.parametrize("zero", [2, rest(3)])
def test_packed_documents_train_as_with_the_other_engine(zero: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of chunks that begin no document are worked out another way: the ranks' graphs differ."""
    from titans_dist.memory import chunked

    monkeypatch.setattr(chunked, "GROUP_TOKENS", 8)
    wanted = run_distributed(packed_curve, 2, MEGATRON)[0]
    for found in run_distributed(packed_curve, 2, settings(zero)):
        same_curve(found, wanted)


@pytest.mark.parametrize("zero", [rest(1), 3])
def test_the_memories_are_seen_as_with_the_other_engine(zero: int) -> None:
    def seen(rank: int, world: int, config: Config) -> Any:
        engine = build(config)
        engine.observes = True
        return engine.step(share(engine, 0, 2)).memories

    wanted = run_distributed(seen, 2, MEGATRON)
    found = run_distributed(seen, 2, settings(zero))
    assert found[1] is None and list(found[0]) == list(wanted[0])
    for path, numbers in found[0].items():
        gates = {"alpha", "eta", "theta"}
        assert {k: v for k, v in numbers.items() if k not in gates} == pytest.approx(
            {k: v for k, v in wanted[0][path].items() if k not in gates}, rel=1e-4
        )


def test_a_job_goes_on_with_another_zero_stage(tmp_path: Path) -> None:
    corpus(tmp_path / "text")
    finish(tmp_path, "prepare", *TEXT)
    job = ("train", *TEXT, *SIZES, "name=job", "parallel.tensor=1", "parallel.data=2", "training.engine=deepspeed")
    done = finish(tmp_path, *job, "training.zero_stage=3", "training.steps=6", world=2)
    run = Run(tmp_path / "runs" / "job")
    unbroken = run.curve
    shutil.rmtree(run.store.folder(6))
    again = finish(tmp_path, *job, "training.zero_stage=1", "training.steps=6", world=2)
    assert run.after_resume() == [5, 6]
    for step, wanted in unbroken.items():
        assert run.curve[step] == pytest.approx(wanted, rel=1e-4), step
    assert done.err == again.err == ""
    assert "DeepSpeed" not in done.out + again.out


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from titans_dist.parallel.deepspeed_engine import import_deepspeed

    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"needs the package deepspeed; pip install titans-dist\[deepspeed\]"):
        import_deepspeed(torch.device("cpu"))


@pytest.mark.parametrize(
    ("zero", "changes", "mend"),
    [
        (0, {"training": {"precision": "bfloat16"}}, "zero_stage=1"),
        (2, {"training": {"carry_state": True}}, "zero_stage=1"),
        (3, {"model": {"variant": "mac", "segment_length": 8}, "parallel": {"context": 2}}, "zero_stage=2"),
    ],
    ids=["bfloat16", "carry_state", "mac"],
)
def test_what_is_not_offered_is_refused(zero: int, changes: dict[str, dict[str, Any]], mend: str) -> None:
    data = dataclasses.replace(CONFIG.data, format="synthetic", sequence_length=32, documents="packed")
    model = dataclasses.replace(CONFIG.model, **changes.get("model", {}))
    base = dataclasses.replace(CONFIG, data=data, model=model)
    layout, training = changes.get("parallel"), changes.get("training", {})
    with pytest.raises(ConfigError, match=f"not offered.*{mend}"):
        validate(settings(zero, layout, base, **training))
    validate(settings(int(mend[-1]), layout, base, **training))
