"""One rank on fake tensors has, does and sends what real processes have, do and send."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest

from tests.distributed import prepare_parent, run_distributed
from tests.parallel.layouts import MODELS, config, rows
from titans_dist.config import Config, ConfigError
from titans_dist.config.sizes import parameter_count
from titans_dist.plan.parameters import part_parameters


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a call in a forked process: megatron-core's groups are global."""
    prepare_parent()
    importlib.import_module("torch._dynamo")  # which fake tensors want: once here, and not in every child
    importlib.import_module("titans_dist.parallel.fake")
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(function, *args).result()


def of(name: str, precision: str = "bfloat16", recompute: str = "selective", **changes: Any) -> Config:
    layout = {key: changes.pop(key) for key in ("tensor", "pipeline", "virtual", "context", "data") if key in changes}
    length = changes.pop("length", 32)
    made = config(dataclasses.replace(MODELS[name], **changes), length=length, **layout)
    training = dataclasses.replace(made.training, precision=precision, recompute=recompute)
    return dataclasses.replace(made, training=training)


def fakes(settings: Config, ranks: list[int], sampled: bool = True) -> list[Any]:
    from titans_dist.parallel.fake import measured

    return [measured(settings, rank, sampled) for rank in ranks]


@dataclasses.dataclass
class Real:
    """Of one process with real tensors: bytes that it has, bytes that the allocator gave it in a step, FLOPs."""

    parameters: int
    gradients: int
    optimizer: int
    kept: int
    """When the head is reached."""
    most: int
    flops: float


def real(rank: int, world: int, settings: Config) -> Real:
    """A real step, seen by torch's profiler and FlopCounterMode."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function
    from torch.utils.flop_counter import FlopCounterMode

    from titans_dist.parallel import cpu
    from titans_dist.parallel.engine import Engine
    from titans_dist.parallel.processes import make_groups

    cpu.install()
    make_groups(settings.parallel)
    engine = Engine(settings, torch.device("cpu"))
    batches = [{"tokens": rows(0, settings.data.sequence_length)[:2]}]
    aten = torch.ops.aten

    def scores(q: Any, k: Any, is_causal: bool) -> int:
        """FLOPs of all scores that are not masked, from shapes (B, H, T, D)."""
        pairs = sum(range(1, q[2] + 1)) if is_causal else q[2] * k[2]
        return int(2 * q[0] * q[1] * q[3] * pairs)

    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, p=0.0, causal=False, **_: (
            2 * scores(q, k, causal)
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, out, lse, p, causal, **_: (
            5 * scores(q, k, causal)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=attention) as counted:
        engine.step(batches)  # the first, which makes the optimizer's state too

    def reached(module: object, args: object) -> None:
        with record_function("head"):
            pass

    engine.stages[0].model.norm.register_forward_pre_hook(reached)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        engine.step(batches)
    events = sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())  # type: ignore[union-attr]
    now = most = kept = 0
    for event in events:
        if event.name() == "head":
            kept = now
        elif event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    buffers = engine.modules[0].buffers
    adam = engine.optimizer.chained_optimizers[0].optimizer
    state = [x for values in adam.state.values() for x in values.values()]
    if settings.training.precision == "bfloat16":  # else the main weights are the parameters
        state += [x for group in adam.param_groups for x in group["params"]]
    return Real(
        sum(buffer.param_data.nbytes for buffer in buffers),
        sum(buffer.grad_data.nbytes for buffer in buffers),
        sum(x.nbytes for x in state),
        kept,
        most,
        counted.get_total_flops(),
    )


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mag", {}),
        ("mac", {"recompute": "none"}),
        ("memora", {"precision": "float32"}),
        ("lmm", {"recompute": "full"}),
        ("lmm", {"length": 1024}),  # two groups of chunks
        ("transformer", {}),
    ],
)
def test_fakes_need_what_real_tensors_need(name: str, changes: dict[str, Any]) -> None:
    settings = of(name, num_layers=2, **changes)
    if settings.data.sequence_length > 512:
        settings.model.memory.chunk_size = 256
    settings.training.global_batch_size = settings.training.micro_batch_size
    (right,) = run_distributed(real, 1, settings)
    (found,) = apart(fakes, settings, [0])
    memory = found.memory
    assert (memory.parameters, memory.gradients) == (right.parameters, right.gradients)
    assert memory.optimizer == pytest.approx(right.optimizer, rel=0.001)
    assert memory.activations + memory.states == pytest.approx(right.kept, rel=0.02)
    before = memory.parameters + memory.gradients + memory.optimizer + found.others
    assert found.peak - before == pytest.approx(right.most, rel=0.05)  # kernels' own buffers are not seen
    assert found.flops == right.flops
    assert found.parameters == parameter_count(settings.model)
    assert (memory.states > 0) == settings.model.has_memory


def test_parameters_of_all_ranks_are_the_model() -> None:
    settings = of("mag", tensor=2, pipeline=2, num_layers=2, tie_embeddings=False)
    found = apart(fakes, settings, [0, 1, 2, 3])
    whole = part_parameters(settings.model, settings.model.num_layers, True, True)
    assert sum(one.parameters for one in found) == sum(p.numel if p.is_split else 2 * p.numel for p in whole)
    alone = of("transformer", pipeline=4, tie_embeddings=False)
    assert sum(one.parameters for one in apart(fakes, alone, [0, 1, 2, 3])) == parameter_count(alone.model)


def test_a_stage_keeps_what_it_has_in_flight() -> None:
    first, *_, last = apart(fakes, of("lmm", pipeline=4, tie_embeddings=False), [0, 1, 2, 3])
    assert (first.micro_batches, last.micro_batches) == (4, 1)
    assert first.memory.states == 4 * last.memory.states
    assert first.memory.logits == 0 < last.memory.logits


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("swa", {"num_layers": 5, "length": 48, "window": 8}),
        ("transformer", {"num_layers": 4, "pipeline": 4}),
        ("lmm", {"num_layers": 3, "length": 3 * 1024}),
    ],
)
def test_a_straight_line_is_where_all_blocks_and_tokens_are(name: str, changes: dict[str, Any]) -> None:
    settings = of("transformer", variant="swa", **changes) if name == "swa" else of(name, **changes)
    if settings.model.has_memory:
        settings.model.memory.chunk_size = 256
    (line,), (every,) = apart(fakes, settings, [0]), apart(fakes, settings, [0], False)
    for part in ("parameters", "gradients", "optimizer", "states", "logits"):
        assert getattr(line.memory, part) == getattr(every.memory, part), part
    assert line.memory.activations == pytest.approx(every.memory.activations, rel=0.001)
    assert line.peak == pytest.approx(every.peak, rel=0.05)
    assert line.flops == every.flops
    assert line.sent == every.sent


def test_what_cannot_be_measured_is_refused() -> None:
    from titans_dist.parallel.fake import measured

    settings = of("mag", tensor=2)
    with pytest.raises(ConfigError, match="rank 2 is none of the layout's 2 processes; use 0 to 1"):
        measured(settings, 2)
    settings.training.engine = "deepspeed"
    with pytest.raises(ConfigError, match=r"use training\.engine=megatron"):
        measured(settings, 0)
