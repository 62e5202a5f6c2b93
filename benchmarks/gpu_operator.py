"""The operator's speed: the machine's ceilings, the operator beside its rivals, and each of its kernels."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from gpu_machine import Call, Row, Settings, peak_bytes, seconds_taking_turns, synchronize, why
from torch import Tensor, nn
from torch.nn import functional as F

from titans_dist.config import MemoryConfig, ModelConfig
from titans_dist.layers.inner_memory import InnerMemory
from titans_dist.layers.mixers import build_mixer
from titans_dist.layers.parameter import Parameter, initial_value
from titans_dist.memory import MemorySpec, neural_memory
from titans_kernels import roofline
from titans_kernels.table import state_in_registers

DEPTH = 2
OURS, THEIRS, FLA = "operator, {}", "layer, titans-pytorch", "operator, fla gated delta rule"
LAYER, RECOMPUTED, RESIDENT = "layer, {}", "operator, {}, states recomputed", "operator, {}, state in registers"
COMPILING_S = 150
"""What compiling the compiled form for one shape may take: it is left out where less time is left."""
MODEL = {
    "gates_kernel": "gates",
    "write_kernel": "writes",
    "read_kernel": "reads",
    "queries_backward_kernel": "queries backward",
    "reads_backward_kernel": "reads backward",
    "write_backward_kernel": "reverse writes",
    "gates_backward_kernel": "gates backward",
}
"""What the roofline calls the kernels."""


@dataclass(frozen=True)
class Sizes:
    """A batch of sequences, and the memory."""

    batch: int
    length: int
    heads: int
    head_dim: int
    expansion: int
    chunk_size: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def memory(self) -> roofline.Memory:
        return roofline.Memory.of(DEPTH, self.head_dim, self.expansion, self.chunk_size)

    @property
    def flops_per_token(self) -> float:
        """Of one forward and backward pass of the operator; nothing counts twice."""
        of_chunk = roofline.forward_flops(self.memory) + roofline.backward_flops(self.memory)
        return of_chunk * self.heads / self.chunk_size

    def describe(self) -> str:
        return (
            f"{self.batch} x {self.length} tokens, {self.heads} heads of {self.head_dim}, depth {DEPTH}, "
            f"expansion {self.expansion}, chunk {self.chunk_size}, bfloat16"
        )


def all_sizes(settings: Settings) -> list[Sizes]:
    if settings.tiny:
        return [Sizes(2, 32, 2, 8, expansion, 8) for expansion in (2, 4)]
    return [Sizes(16, 4096, 16, 64, expansion, 64) for expansion in (2, 4)]


def ceilings(settings: Settings) -> Row:
    """FLOP/s of a large bfloat16 product and bytes/s of a large copy, read and written, on random data."""
    n, size = (64, 1 << 16) if settings.tiny else (8192, 1 << 30)
    left, right = (torch.randn(n, n, device=settings.device).bfloat16() for _ in range(2))
    source = torch.randn(size, device=settings.device)
    target = torch.empty_like(source)
    calls: dict[str, Call] = {"matmul": lambda: left @ right, "copy": lambda: target.copy_(source)}
    for call in calls.values():
        call()
    times = seconds_taking_turns(calls, settings.device, 3 if settings.tiny else 20)
    return {
        "matmul_flops_per_s": 2 * n**3 / statistics.median(times["matmul"]),
        "copy_bytes_per_s": 8 * size / statistics.median(times["copy"]),
    }


def operators(settings: Settings, matmul_flops_per_s: float) -> list[Row]:
    """Forward and backward of the operator, and of the layer around it, beside the rivals', for each size."""
    return [row for sizes in all_sizes(settings) for row in _rivals(settings, sizes, matmul_flops_per_s)]


def _rivals(settings: Settings, sizes: Sizes, matmul_flops_per_s: float) -> list[Row]:
    kernels = settings.backend
    makers: dict[str, Callable[[Sizes], Call]] = {
        OURS.format(kernels): lambda sizes: operator(settings, sizes, kernels),
        RECOMPUTED.format(kernels): lambda sizes: operator(settings, sizes, kernels, recompute=True),
        FLA: lambda sizes: fla_gated_delta_rule(settings, sizes),
        LAYER.format(kernels): lambda sizes: layer(settings, sizes, kernels),
        THEIRS: lambda sizes: titans_pytorch_layer(settings, sizes),
    }
    if kernels != "torch":
        if sizes.expansion <= 2:
            makers[RESIDENT.format(kernels)] = lambda sizes: in_registers(operator(settings, sizes, kernels))
        makers[OURS.format("torch")] = lambda sizes: operator(settings, sizes, "torch")
    if not (settings.quick or settings.seconds_left < COMPILING_S):
        makers[OURS.format("compiled")] = lambda sizes: operator(settings, sizes, "compiled")
    calls: dict[str, Call] = {}
    rows: dict[str, Row] = {}
    for name, make in makers.items():
        rows[name] = {"sizes": sizes.describe(), "expansion": sizes.expansion, "rival": name}
        try:
            calls[name], rows[name]["tokens"] = _fitting(make, sizes, settings.device)
        except Exception as error:
            rows[name]["error"] = why(error)
    times = seconds_taking_turns(calls, settings.device, 3 if settings.quick or settings.tiny else 10)
    for name, call in calls.items():
        row, seconds, peak = rows[name], statistics.median(times[name]), peak_bytes(call, settings.device)
        tokens = row["tokens"]
        row |= {"seconds": seconds, "times": times[name], "tokens_per_s": tokens / seconds, "peak_bytes": peak}
        row["bytes_per_token"] = None if peak is None else peak / tokens
        if name.startswith("operator") and name != FLA:
            row["flops_per_s"] = sizes.flops_per_token * tokens / seconds
            row["share"] = row["flops_per_s"] / matmul_flops_per_s
    return list(rows.values())


def in_registers(call: Call) -> Call:
    """`call` with the sequential kernels that keep the state in registers."""

    def run() -> None:
        with state_in_registers(torch.device("cuda", torch.cuda.current_device())):
            call()

    return run


def _fitting(make: Callable[[Sizes], Call], sizes: Sizes, device: str) -> tuple[Call, int]:
    """A call that has run twice, with half the sequences, and so on, where memory is short, and its tokens."""
    while True:
        try:
            call = make(sizes)
            for _ in range(2):
                call()
            synchronize(device)
            return call, sizes.tokens
        except torch.OutOfMemoryError:
            if sizes.batch == 1:
                raise
        sizes = replace(sizes, batch=sizes.batch // 2)
        torch.cuda.empty_cache()


def operator(settings: Settings, sizes: Sizes, backend: str, recompute: bool = False) -> Call:
    """Forward and backward of the operator: gradients of everything but a state."""
    device, shape = settings.device, (sizes.batch, sizes.length, sizes.heads, sizes.head_dim)
    g = torch.Generator(device).manual_seed(settings.seed)
    spec = MemorySpec(depth=DEPTH, expansion=sizes.expansion)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=device)

    q, k = (F.normalize(normal(*shape), dim=-1).bfloat16() for _ in range(2))
    v, wanted = (normal(*shape).bfloat16() for _ in range(2))
    alpha, eta, theta = (
        torch.rand(shape[:3], generator=g, device=device) * most for most in (0.02, 0.9, 1 / sizes.chunk_size)
    )
    shapes = zip(spec.shapes(sizes.head_dim), spec.initial_std(sizes.head_dim), strict=True)
    weights = [normal(sizes.heads, *size) * std for size, std in shapes]
    ones = torch.ones(sizes.heads, sizes.head_dim, device=device)
    norm = (ones, torch.zeros_like(ones))
    leaves = [x.requires_grad_() for x in (q, k, v, alpha, eta, theta, *weights, *norm)]

    def call() -> None:
        y, _ = neural_memory(
            q, k, v, spec=spec, weights=weights, alpha=alpha, eta=eta, theta=theta, norm=norm,
            chunk_size=sizes.chunk_size, recompute=recompute, backend=backend,
        )  # fmt: skip
        torch.autograd.grad(y, leaves, wanted)

    return call


def fla_gated_delta_rule(settings: Settings, sizes: Sizes) -> Call:
    """flash-linear-attention's kernels at the same width: a matrix memory, no momentum."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    shape = (sizes.batch, sizes.length, sizes.heads, sizes.head_dim)
    g = torch.Generator(settings.device).manual_seed(settings.seed)
    q, k, v, wanted = (torch.randn(shape, generator=g, device=settings.device) for _ in range(4))
    decay, beta = (torch.rand(shape[:3], generator=g, device=settings.device) for _ in range(2))
    leaves = [F.normalize(q, dim=-1).bfloat16(), F.normalize(k, dim=-1).bfloat16(), v.bfloat16()]
    leaves = [x.requires_grad_() for x in (*leaves, -0.02 * decay, beta.bfloat16())]
    of_output = wanted.bfloat16()

    def call() -> None:
        y, _ = chunk_gated_delta_rule(*leaves, scale=1.0)
        torch.autograd.grad(y, leaves, of_output)

    return call


def layer(settings: Settings, sizes: Sizes, backend: str) -> Call:
    """This project's memory layer: projections, convolutions, gates, memory, norms. Parameters in bfloat16."""
    memory = MemoryConfig(depth=DEPTH, expansion=sizes.expansion, chunk_size=sizes.chunk_size, backend=backend)
    config = ModelConfig(
        variant="lmm",
        num_layers=1,
        hidden_size=sizes.heads * sizes.head_dim,
        num_heads=sizes.heads,
        persistent_tokens=0,
        memory=memory,
    )
    module = build_mixer(config)
    with torch.no_grad():
        for name, value in module.named_parameters():
            assert isinstance(value, Parameter)
            value.copy_(initial_value(name, value, 0))
    for part in module.modules():
        if isinstance(part, InnerMemory):
            part.recompute = False
    return _trained(module, settings, sizes)


def titans_pytorch_layer(settings: Settings, sizes: Sizes) -> Call:
    """titans-pytorch's memory layer of the same sizes; the gradient's chunk is the update's, as in the paper."""
    from titans_pytorch import MemoryMLP, NeuralMemory

    module = NeuralMemory(
        dim=sizes.heads * sizes.head_dim,
        heads=sizes.heads,
        dim_head=sizes.head_dim,
        chunk_size=sizes.chunk_size,
        batch_size=sizes.chunk_size,
        model=MemoryMLP(dim=sizes.head_dim, depth=DEPTH, expansion_factor=float(sizes.expansion)),
    )
    for part in module.modules():  # with several heads its parameters are views that cannot be trained
        for name, value in list(part._parameters.items()):
            if value is not None:
                part._parameters[name] = nn.Parameter(value.detach().clone().contiguous())
    return _trained(module, settings, sizes)


def _trained(module: nn.Module, settings: Settings, sizes: Sizes) -> Call:
    module = module.to(settings.device, torch.bfloat16)
    shape = (sizes.batch, sizes.length, sizes.heads * sizes.head_dim)
    g = torch.Generator(settings.device).manual_seed(settings.seed)
    x, wanted = (torch.randn(shape, generator=g, device=settings.device).bfloat16() for _ in range(2))
    x.requires_grad_()
    leaves: list[Any] = [x, *module.parameters()]

    def call() -> None:
        y = module(x)
        torch.autograd.grad(y[0] if isinstance(y, tuple) else y, leaves, wanted, allow_unused=True)

    return call


def kernels(settings: Settings) -> list[Row]:
    """Each kernel's own time in one forward and backward pass of the operator, and the roofline's range for it.

    As in training: the states of chunks are worked out again.
    """
    sizes = all_sizes(settings)[-1]
    call = operator(settings, sizes, settings.backend, recompute=True)
    call()
    synchronize(settings.device)
    kind = torch.profiler.ProfilerActivity
    is_gpu = settings.device == "cuda"
    with torch.profiler.profile(activities=[kind.CPU, kind.CUDA] if is_gpu else [kind.CPU]) as profile:
        call()
        synchronize(settings.device)
    of, kind_of = ("self_device_time_total", "CUDA") if is_gpu else ("self_cpu_time_total", "CPU")
    events = [  # of a kernel itself: what launched it has its time too
        (event.key, getattr(event, of) / 1e6, event.count)
        for event in profile.key_averages()
        if event.device_type.name == kind_of
    ]
    events = sorted((event for event in events if event[1] > 0), key=lambda event: -event[1])
    total, card = sum(seconds for _, seconds, _ in events), roofline.H100
    if is_gpu and "H200" in torch.cuda.get_device_name():
        card = roofline.H200
    chunks = sizes.tokens * sizes.heads / sizes.chunk_size / roofline.MULTIPROCESSORS / roofline.CLOCK_HZ
    memory = sizes.memory.padded()
    model = {one.name: one.clocks(card, memory).values() for one in roofline.cached_passes(memory)}
    rows = []
    for name, seconds, count in events[:16]:
        row: Row = {"kernel": name, "launches": count, "seconds": seconds, "share": seconds / total}
        if name in MODEL:
            units = list(model[MODEL[name]])
            times = 2 if name in ("write_kernel", "gates_kernel") else 1  # again for the backward pass
            row |= {"model_overlapped": times * chunks * max(units), "model_one_by_one": times * chunks * sum(units)}
        rows.append(row)
    return rows


def targets(rows: list[Row], backend: str) -> list[Row]:
    """What the operator should reach, for each expansion."""
    found = []
    for expansion in sorted({row["expansion"] for row in rows}):
        by_name = {row["rival"]: row for row in rows if row["expansion"] == expansion}
        ours, their_layer, fla = by_name[OURS.format(backend)], by_name[THEIRS], by_name[FLA]
        our_layer = by_name[LAYER.format(backend)]
        found += [
            target(f"layer / titans-pytorch's, expansion {expansion}", ratio(our_layer, their_layer), 10),
            target(f"operator / fla's gated delta rule, expansion {expansion}", ratio(ours, fla), 0.8),
            target(f"share of the matrix product rate, expansion {expansion}", ours.get("share"), 0.35),
        ]
    return found


def ratio(ours: Row, theirs: Row) -> float | None:
    """Of tokens per second."""
    if "tokens_per_s" not in ours or "tokens_per_s" not in theirs:
        return None
    return ours["tokens_per_s"] / theirs["tokens_per_s"]


def target(name: str, value: float | None, least: float) -> Row:
    met = "not measured" if value is None else "met" if value >= least else "not met"
    return {"target": name, "least": least, "value": value, "met": met}
