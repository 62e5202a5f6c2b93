"""What a step of the real engine sends is counted call by call, and equals what the configuration says."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.parallel.layouts import MODELS, SMALL, config, document_starts, rows, variant
from titans_dist.config import Config, ConfigError, ModelConfig
from titans_dist.config.layout import world_size
from titans_dist.config.sizes import parameter_count
from titans_dist.plan.communication import Traffic, analytic, busiest
from titans_dist.plan.parameters import part_parameters

Counts = dict[tuple[str, str], tuple[int, float]]
"""(kind, operation) -> (calls, bytes)."""

OTHERS = {
    "tnt": variant("lmm", chunk_size=2, global_chunk_size=4, shard_size=8),
    "channel_wise": variant("mag", preset="yaad", channel_wise=True, gate_rank=3),
    "channel_wise_mac": variant("mac", channel_wise=True, gate_rank=3),
    "channel_wise_tnt": variant(
        "lmm", chunk_size=2, global_chunk_size=4, shard_size=12, channel_wise=True, gate_rank=3
    ),
    "retnet": variant("lmm", preset="retnet"),
    "swa": dataclasses.replace(SMALL, variant="swa", window=20),
    "grouped": dataclasses.replace(SMALL, variant="mag", num_kv_heads=2),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor": 2, "sequence": False},
    "tp2_sp": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "pp2_vpp2": {"pipeline": 2, "virtual": 2},
    "cp2": {"context": 2},
    "cp2_ring": {"context": 2, "context_mode": "ring"},
    "cp2_scan": {"context": 2, "context_mode": "scan"},
    "cp4_ring": {"context": 4, "context_mode": "ring"},
    "dp2": {"data": 2},
    "tp2_cp2": {"tensor": 2, "context": 2},
    "tp2_pp2": {"tensor": 2, "pipeline": 2},
}
# Two micro-batches of two rows, of one copy of a model of two blocks.
MICRO_BATCHES, BLOCKS = 2, 2


def made(model: ModelConfig, precision: str = "float32", recompute: str = "none", **parallel: Any) -> Config:
    settings = config(model, **parallel)
    training = dataclasses.replace(
        settings.training, global_batch_size=2 * MICRO_BATCHES, precision=precision, recompute=recompute
    )
    return dataclasses.replace(settings, training=training)


def of(name: str, **changes: Any) -> ModelConfig:
    return dataclasses.replace((MODELS | OTHERS)[name], **{"num_layers": BLOCKS, **changes})


def step(rank: int, world: int, settings: Config) -> tuple[Counts, int, int, int]:
    """Counts of this process in one step; its copies, its stage and its share."""
    from megatron.core import parallel_state

    from titans_dist.parallel import cpu
    from titans_dist.parallel.communication import count_communication
    from titans_dist.parallel.engine import Engine
    from titans_dist.parallel.processes import make_groups

    cpu.install()
    make_groups(settings.parallel)
    engine = Engine(settings, torch.device("cpu"))
    length = settings.data.sequence_length
    count = settings.training.global_batch_size
    share = {"tokens": rows(0, length)[:count]}
    if settings.data.documents == "packed":
        share["starts"] = document_starts(0, length)[:count]
    own = {name: x.chunk(engine.data_size)[engine.data_rank] for name, x in share.items()}
    split = {name: x.split(settings.training.micro_batch_size) for name, x in own.items()}
    batches = [dict(zip(split, parts, strict=True)) for parts in zip(*split.values(), strict=True)]
    with count_communication() as sent:
        engine.step(batches)
    counts = {key: (one.calls, one.size_bytes) for key, one in sent.counts.items()}
    stage = parallel_state.get_pipeline_model_parallel_rank()
    return counts, engine.data_size, stage, parallel_state.get_context_parallel_rank()


def totals(traffic: list[Traffic]) -> Counts:
    found: Counts = {}
    for one in traffic:
        calls, size = found.get((one.kind, one.operation), (0, 0.0))
        found[one.kind, one.operation] = (calls + one.calls, size + one.size_bytes)
    return found


def measured(settings: Config) -> list[Counts]:
    """Of all processes, without control messages; each is what `analytic` says of its place, to the byte."""
    ranks = []
    for counts, copies, stage, share in run_distributed(step, world_size(settings.parallel), settings):
        control = sum(size for (kind, _), (_, size) in counts.items() if kind == "control")
        assert 0 < control < 200  # the loss and the gradient norm
        own = {key: value for key, value in counts.items() if key[0] != "control"}
        assert own == totals(analytic(settings, copies, stage, share)), (copies, stage, share)
        ranks.append(own)
    return ranks


FEW = [
    *(("mag", layout) for layout in ("tp2", "tp2_sp", "pp2", "cp2", "dp2")),
    *(("mac", "tp2_sp"), ("mac", "cp2"), ("mal", "tp2"), ("mal", "tp2_sp"), ("lmm", "tp2_cp2"), ("lmm", "pp2_vpp2")),
    *(("gated_deltanet", "cp2_scan"), ("transformer", "cp2")),
]
MORE = [
    *(("channel_wise", layout) for layout in ("tp2", "tp2_sp", "cp2")),
    *(
        ("channel_wise_mac", "tp2"),
        ("channel_wise_tnt", "tp2"),
        ("tnt", "cp2"),
        ("tnt", "cp2_ring"),
        ("retnet", "cp2_scan"),
        ("swa", "cp4_ring"),
    ),
    *(("mag", "tp2_pp2"), ("mal", "cp2_ring"), ("mac", "tp2"), ("mac", "tp2_cp2"), ("mac", "cp4_ring")),
    *(("transformer", "tp2_cp2"), ("grouped", "tp2_cp2")),
]


@pytest.mark.parametrize(("name", "layout"), [*FEW, *(pytest.param(*case, marks=pytest.mark.matrix) for case in MORE)])
def test_what_is_sent_is_what_the_configuration_says(name: str, layout: str) -> None:
    layers = 4 if layout == "pp2_vpp2" else BLOCKS
    measured(made(of(name, num_layers=layers), **LAYOUTS[layout]))


@pytest.mark.parametrize(
    ("name", "layout", "changes"),
    [
        ("lmm", "cp2", {"precision": "bfloat16"}),
        ("mag", "tp2_sp", {"precision": "bfloat16"}),
        ("mal", "cp2", {"recompute": "full"}),
        ("lmm", "tp2_sp", {"recompute": "full"}),
        ("mac", "tp2", {"recompute": "full"}),
        ("mac", "cp2", {"precision": "bfloat16", "recompute": "selective"}),
        ("mac", "cp2", {"recompute": "full"}),
    ],
)
def test_precision_and_recomputation_are_reckoned_with(name: str, layout: str, changes: dict[str, str]) -> None:
    measured(made(of(name), **changes, **LAYOUTS[layout]))


def test_gates_that_nobody_learns_send_no_gradients_in_bfloat16() -> None:
    first, _ = measured(made(of("retnet"), precision="bfloat16", **LAYOUTS["cp2"]))
    assert first["context", "all_to_all"][0] == MICRO_BATCHES * BLOCKS * (3 + 2)


def test_packed_rows_say_where_documents_start() -> None:
    settings = made(of("lmm"), **LAYOUTS["cp2"])
    packed = dataclasses.replace(settings, data=dataclasses.replace(settings.data, documents="packed"))
    assert measured(packed)[0]["context", "all_to_all"] > measured(settings)[0]["context", "all_to_all"]


def test_untied_models_without_persistent_tokens_and_convolutions() -> None:
    bare = of("mal", tie_embeddings=False, persistent_tokens=0, conv_kernel=1)
    first, _ = measured(made(bare, **LAYOUTS["pp2"]))
    assert ("pipeline", "all_reduce") not in first  # of the tied weight
    measured(made(bare, **LAYOUTS["cp2"]))


def test_each_sub_block_costs_two_collectives_each_way() -> None:
    sub_blocks = 2 * BLOCKS
    sequence, _ = measured(made(of("lmm"), **LAYOUTS["tp2_sp"]))
    # Forward a gather into each sub-block and the head, and a scatter out of each and the embedding; backward the same
    # the other way round.
    calls = MICRO_BATCHES * 2 * (sub_blocks + 1)
    assert sequence["tensor", "all_gather"][0] == sequence["tensor", "reduce_scatter"][0] == calls
    assert sequence["tensor", "all_reduce"][0] == MICRO_BATCHES * 3 + 1  # the loss; once the norms' gradients
    plain, _ = measured(made(of("lmm"), **LAYOUTS["tp2"]))
    # One all-reduce in the place of each pair, and the persistent tokens of each block sum their gradient.
    assert plain["tensor", "all_reduce"][0] == MICRO_BATCHES * (2 * (sub_blocks + 1) + 3 + BLOCKS)
    assert {operation for kind, operation in plain if kind == "tensor"} == {"all_reduce"}


def test_heads_cost_two_messages_each_way_and_the_ring_one_per_group_and_border() -> None:
    memories = MICRO_BATCHES * BLOCKS
    for rank, heads in enumerate(measured(made(of("lmm"), **LAYOUTS["cp2"]))):
        assert heads["context", "all_to_all"][0] == memories * (2 + 2)
        assert heads["context", "send"][0] == memories, rank  # the convolutions: forward by the first, backward to it
    groups = 4  # two rows, halves of the heads
    for ring in measured(made(of("lmm"), **LAYOUTS["cp2_ring"])):
        assert ring["context", "send"][0] == memories * (groups + 1)
        assert ring["context", "all_reduce"][0] == memories
    first, second, third, last = measured(made(of("lmm"), **LAYOUTS["cp4_ring"]))
    assert first["context", "send"] == last["context", "send"]
    assert second["context", "send"] == third["context", "send"]
    assert second["context", "send"] == tuple(2 * x for x in first["context", "send"])


def test_gradients_are_bucketed_as_megatron_core_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from titans_dist.parallel import engine
    from titans_dist.plan import communication

    with_size = functools.partial(engine.DistributedDataParallelConfig, bucket_size=3000)
    monkeypatch.setattr(engine, "DistributedDataParallelConfig", with_size)
    monkeypatch.setattr(communication, "BUCKET", 3000)
    monkeypatch.setattr(communication, "PER_COPY", 0)
    assert measured(made(of("mag"), **LAYOUTS["dp2"]))[0]["data", "reduce_scatter"][0] > 3
    for counts in measured(made(of("swa"), pipeline=2, context=2)):
        assert counts["data", "all_gather"][0] > 1  # the tied embedding has one of its own


@pytest.mark.parametrize("name", sorted(MODELS | OTHERS))
def test_single_parameters_add_up_to_the_model(name: str) -> None:
    model = of(name)
    assert sum(p.numel for p in part_parameters(model, BLOCKS, True, True)) == parameter_count(model)


def test_the_busiest_process_is_in_the_middle() -> None:
    settings = made(of("lmm"), context=4, context_mode="ring")
    assert totals(busiest(settings, 1)) == totals(analytic(settings, 1, share=1)) != totals(analytic(settings, 1))


def test_deepspeed_is_not_worked_out() -> None:
    settings = made(SMALL)
    settings.training.engine = "deepspeed"
    with pytest.raises(ConfigError, match=r"use training\.engine=megatron"):
        analytic(settings, 1)


CALLS = {  # three processes; a tensor is of 6 float32, 24 bytes
    "all_reduce": ("all_reduce", 1, 2 * 2 / 3 * 24),
    "all_reduce, asynchronous": ("all_reduce", 1, 2 * 2 / 3 * 24),
    "all_reduce, coalesced": ("all_reduce", 1, 2 * 2 / 3 * 2 * 24),
    "all_reduce, backward": ("all_reduce", 1, 2 * 2 / 3 * 24),
    "all_gather": ("all_gather", 1, 2 / 3 * 3 * 24),
    "all_gather_into_tensor": ("all_gather", 1, 2 / 3 * 3 * 24),
    "all_gather_into_tensor, coalesced": ("all_gather", 1, 2 / 3 * 2 * 3 * 24),
    "reduce_scatter_tensor": ("reduce_scatter", 1, 2 / 3 * 24),
    "reduce_scatter_tensor, coalesced": ("reduce_scatter", 1, 2 / 3 * 2 * 24),
    "all_to_all_single": ("all_to_all", 1, 2 / 3 * 24),
    "all_to_all_single, uneven": ("all_to_all", 1, 5 / 6 * 24),
    "send": ("send", 1, 24.0),
    "isend": ("send", 1, 24.0),
    "batch_isend_irecv": ("send", 1, 24.0),
    "broadcast from here": ("broadcast", 1, 24.0),
    "broadcast from there": ("broadcast", 1, 0.0),
}


def communicate(rank: int, world: int) -> tuple[dict[str, Any], dict[str, Any], bool, int]:
    """Counts of each call of CALLS and of control calls; whether anything is left on; how often torch compiled."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
    from torch.distributed.distributed_c10d import _coalescing_manager
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    from titans_dist.parallel.communication import count_communication

    parallel_state.initialize_model_parallel(world)
    group = parallel_state.get_tensor_model_parallel_group()
    x, many, third = torch.ones(6), torch.ones(18), torch.ones(2)
    after, before = (rank + 1) % world, (rank - 1) % world

    compiled = []

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compiled.append(module)
        return module.forward

    def coalesced(call: Callable[[], object]) -> None:
        with _coalescing_manager(group, async_ops=True) as work:
            call()
            call()
        work.wait()

    def ring(send: Callable[..., Any]) -> None:
        request = dist.irecv(torch.empty(6), before, group)
        sent = send(x, after, group)
        for one in (request, sent):
            if one is not None:
                one.wait()

    def batched() -> None:
        ops = [dist.P2POp(dist.isend, x, after, group), dist.P2POp(dist.irecv, torch.empty(6), before, group)]
        for request in dist.batch_isend_irecv(ops):
            request.wait()

    def uneven() -> None:
        sizes = [1, 2, 3] if rank == 0 else [2, 2, 2]  # what the first keeps, and gives to the others
        received = [sizes[0], 2, 2] if rank == 0 else [[1, 2, 3][rank], 2, 2]
        dist.all_to_all_single(torch.empty(sum(received)), x, received, sizes, group=group)

    def backward() -> None:
        y = torch.ones(6, requires_grad=True)
        copy_to_tensor_model_parallel_region(y).sum().backward()

    def asynchronous() -> None:
        work = dist.all_reduce(x, group=group, async_op=True)
        assert work is not None
        work.wait()

    parts = [torch.empty(6) for _ in range(world)]
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(x, group=group),
        "all_reduce, asynchronous": asynchronous,
        "all_reduce, coalesced": lambda: coalesced(lambda: dist.all_reduce(x, group=group)),
        "all_reduce, backward": backward,
        "all_gather": lambda: dist.all_gather(parts, x, group=group),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(many, x, group=group),
        "all_gather_into_tensor, coalesced": lambda: coalesced(
            lambda: dist.all_gather_into_tensor(many, x, group=group)
        ),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(third, x, group=group),
        "reduce_scatter_tensor, coalesced": lambda: coalesced(
            lambda: dist.reduce_scatter_tensor(third, x, group=group)
        ),
        "all_to_all_single": lambda: dist.all_to_all_single(torch.empty(6), x, group=group),
        "all_to_all_single, uneven": uneven,
        "send": lambda: ring(dist.send),
        "isend": lambda: ring(dist.isend),
        "batch_isend_irecv": batched,
        "broadcast from here": lambda: dist.broadcast(x, 0, group),
        "broadcast from there": lambda: dist.broadcast(x, 1, group),
    }
    control: dict[str, Callable[[], object]] = {
        "the world's": lambda: dist.all_reduce(x),
        "integers": lambda: dist.all_reduce(torch.ones(6, dtype=torch.int64), group=group),
        "objects": lambda: dist.all_gather_object([None] * world, {"a": 1}, group=group),
        "barrier": lambda: dist.barrier(group),
        "one process": lambda: dist.all_reduce(x, group=parallel_state.get_data_parallel_group()),
    }

    def counted(call: Callable[[], object]) -> dict[tuple[str, str], tuple[int, float]]:
        call()
        with count_communication() as sent:
            call()
        call()  # neither before nor after
        return {key: (one.calls, one.size_bytes) for key, one in sent.counts.items()}

    found = {name: counted(call) for name, call in calls.items()}
    control_found = {name: counted(call) for name, call in control.items()}
    with count_communication():
        torch.compile(lambda y: 2 * y, backend=backend)(x)
    return found, control_found, bool(_get_current_dispatch_mode_stack()), len(compiled)


def test_the_counter_sees_every_kind_of_call_while_it_is_active() -> None:
    found, control, is_left_on, compilations = run_distributed(communicate, 3)[0]
    for name, (operation, calls, size) in CALLS.items():
        assert found[name] == {("tensor", operation): (calls, pytest.approx(size))}, name
    assert set(control["the world's"]) == set(control["integers"]) == {("control", "all_reduce")}
    assert set(control["objects"]) == {("control", "all_gather")}
    assert control["barrier"] == {("control", "barrier"): (1, 0.0)}
    assert control["one process"] == {}
    assert not is_left_on
    assert compilations == 1  # what torch.compile makes is not left uncompiled by being counted


def test_the_table_has_a_row_for_every_kind() -> None:
    from titans_dist.parallel.communication import Communication, table

    measured = Communication()
    for _ in range(2):
        measured.add("tensor", "all_reduce", 600.0)
    measured.add("control", "all_reduce", 16.0)
    rows = table(measured, [Traffic("tensor", "all_reduce", "x", 2, 1000.0), Traffic("data", "send", "y", 1, 10.0)])
    assert [row.texts() for row in rows] == [
        ("tensor", "2", "1,200", "1,000", "1.2000"),
        ("data", "0", "0", "10", "0.0000"),
        ("control", "1", "16", "-", "-"),
    ]
