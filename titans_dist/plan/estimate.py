"""How long a step takes: an estimate from sizes, with a range. Nothing here was measured on the machine it is about.

A step is the work of its micro-batches, at some share of the peak, and what waits for messages; then bubbles. What is
assumed is in ASSUMPTIONS, and each range goes from the slow end of every assumption to its fast end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from titans_dist.config import Config
from titans_dist.config.layout import bubble, context_groups, parts, uses_ring
from titans_dist.plan import flops
from titans_dist.plan.communication import KINDS, Traffic, analytic
from titans_dist.plan.hardware import Gpu
from titans_dist.plan.kept import has_kernels
from titans_dist.plan.memory import checkpoint_bytes
from titans_dist.plan.place import Place

GPUS_PER_NODE = 8
"""Where cluster.gpus_per_node is 0."""


@dataclass(frozen=True)
class Range:
    """From the slow end of all assumptions to the fast one."""

    slow: float
    fast: float

    def map(self, change: Callable[[float], float]) -> Range:
        """Both ends changed."""
        return Range(change(self.slow), change(self.fast))


MATMUL = Range(0.45, 0.75)
"""Share of the data sheet's peak that large products reach; 0.80 was measured for one of 8192 cubed on an H100."""
ATTENTION = Range(0.25, 0.60)
"""Of attention's fused kernels."""
MEMORY = Range(0.04, 0.12)
"""Of the memory operator by Triton kernels: what kernels/README.md works out for an H100, 6 to 15 % of the rate that
products reach there; not measured."""
MEMORY_TORCH = Range(0.01, 0.06)
"""Of the memory operator in torch: many small products; a guess."""
OTHER = Range(0.30, 0.10)
"""What norms, convolutions, activations and the optimizer take, as a share of the matrix products' time; a guess."""
LINKS = Range(0.6, 0.85)
"""Share of a link's rate that large messages reach."""
OVERLAP = Range(0.0, 0.8)
"""Share of the sums of gradients that goes on beside the backward pass."""
LATENCY_S = Range(40e-6, 10e-6)
"""Of one call."""
DISK = Range(0.5e9, 2e9)
"""Bytes per second that each node writes to shared storage; a guess."""

ASSUMPTIONS = {
    "matrix products": f"{MATMUL.slow:.0%} to {MATMUL.fast:.0%} of the peak",
    "attention": f"{ATTENTION.slow:.0%} to {ATTENTION.fast:.0%}",
    "memory operator": f"{MEMORY.slow:.0%} to {MEMORY.fast:.0%} by kernels, {MEMORY_TORCH.slow:.0%} to "
    f"{MEMORY_TORCH.fast:.0%} in torch",
    "everything else": f"{OTHER.fast:.0%} to {OTHER.slow:.0%} on top of the matrix products",
    "links": f"{LINKS.slow:.0%} to {LINKS.fast:.0%} of their rate, {LATENCY_S.fast * 1e6:.0f} to "
    f"{LATENCY_S.slow * 1e6:.0f} us a call",
    "sums of gradients": f"{OVERLAP.slow:.0%} to {OVERLAP.fast:.0%} beside the backward pass; nothing else is",
    "storage": f"{DISK.slow / 1e9:.1f} to {DISK.fast / 1e9:.1f} GB/s a node",
}


@dataclass(frozen=True)
class Link:
    """What all messages of one kind go over."""

    kind: str
    is_network: bool
    bytes_per_s: float


@dataclass(frozen=True)
class Message:
    """All messages of one kind that the busiest process sends in one step."""

    kind: str
    link: str
    """link (inside a node), network, or nothing."""
    calls: int
    size_bytes: float
    seconds: Range


@dataclass(frozen=True)
class Estimate:
    """Of one step, and of the run."""

    compute_s: Range
    messages: list[Message]
    pipeline_bubble: float
    ring_bubble: float
    step_s: Range
    mfu: Range
    tokens_per_day: Range
    days: Range
    gpu_hours: Range
    checkpoint_bytes: int
    checkpoint_s: Range
    data_bytes_per_s: Range


def gpus_per_node(config: Config) -> int:
    """GPUs of a node, as the configuration says or as usual."""
    return config.cluster.gpus_per_node or GPUS_PER_NODE


def estimate(config: Config, copies: int, gpu: Gpu) -> Estimate:
    """Of `copies` copies of the model on GPUs of one kind."""
    parallel, training = config.parallel, config.training
    world = parallel.tensor * parallel.context * parallel.pipeline * copies
    tokens = training.global_batch_size * config.data.sequence_length
    compute = _compute(config, copies, gpu)
    messages = _messages(config, copies, gpu)
    in_line = sum_of(one.seconds for one in messages if one.kind != "data")
    beside = sum_of(one.seconds for one in messages if one.kind == "data")
    place = Place(config, copies, 0, 0)
    waits = pipeline_bubble(config, place.micro_batches)
    ring = ring_bubble(config, place)
    memory_share = _memory_share(config, gpu)

    def step(end: str) -> float:
        work = getattr(compute, end)
        work += work * getattr(memory_share, end) * ring / (1 - ring)
        hidden = 0.0 if training.carry_state or parallel.pipeline > 1 else getattr(OVERLAP, end)
        return (work + getattr(in_line, end)) / (1 - waits) + getattr(beside, end) * (1 - hidden)

    step_s = Range(step("slow"), step("fast"))
    useful = flops.training(config).total() * tokens / world / gpu.peak(training.precision)
    per_day = step_s.map(lambda s: tokens * 86400 / s)
    days = step_s.map(lambda s: s * training.steps / 86400)
    size = checkpoint_bytes(config)
    nodes = ceil(world / gpus_per_node(config))
    width = 4 if config.data.vocab_size > 1 << 16 or config.data.dtype == "uint32" else 2
    return Estimate(
        compute,
        messages,
        waits,
        ring,
        step_s,
        step_s.map(lambda s: useful / s),
        per_day,
        days,
        days.map(lambda d: d * 24 * world),
        size,
        DISK.map(lambda rate: size / (rate * nodes)),
        per_day.map(lambda n: n / 86400 * width),
    )


def pipeline_bubble(config: Config, micro_batches: int) -> float:
    """Share of the step that a stage waits for others: (P - 1) / (V M + P - 1) of P stages and M micro-batches."""
    stages = config.parallel.pipeline
    return (stages - 1) / (config.parallel.virtual * micro_batches + stages - 1)


def ring_bubble(config: Config, place: Place) -> float:
    """Share of the memory's time that a process waits for the state; 0 where none is handed on."""
    if not uses_ring(config):
        return 0.0
    heads = 1 if config.model.variant == "mac" else place.heads
    return bubble(config.parallel.context, context_groups(config.parallel, place.rows, heads))


def links(config: Config, copies: int, gpu: Gpu) -> dict[str, Link]:
    """Kind of message -> what it goes over. Ranks are in the order tensor, context, data, pipeline.

    A group over several nodes with some members in each has as many network adapters.
    """
    parallel, node = config.parallel, gpus_per_node(config)
    found, stride = {}, 1
    for kind, size in (
        ("tensor", parallel.tensor),
        ("context", parallel.context),
        ("data", copies),
        ("pipeline", parallel.pipeline),
    ):
        # Gradients are summed over the shares of a sequence as well.
        first = parallel.tensor if kind == "data" else stride
        extent = stride * size
        is_network = extent > node and extent > first
        inside = max(1, node // first) if kind in ("tensor", "data") else 1
        found[kind] = Link(kind, is_network, min(gpu.link, gpu.network * inside) if is_network else gpu.link)
        stride = extent
    return found


def sum_of(ranges: object) -> Range:
    """Of all of them."""
    every = list(ranges)  # type: ignore[call-overload]
    return Range(sum(one.slow for one in every), sum(one.fast for one in every))


def traffic(config: Config, copies: int) -> list[Traffic]:
    """What the busiest process sends: of a middle stage and the first and last ones, of the first two shares."""
    parallel = config.parallel
    stages = sorted({0, parallel.pipeline // 2, parallel.pipeline - 1})
    shares = sorted({0, min(1, parallel.context - 1)})
    every = [analytic(config, copies, stage, share) for stage in stages for share in shares]
    return max(every, key=lambda sent: sum(one.size_bytes for one in sent))


def _messages(config: Config, copies: int, gpu: Gpu) -> list[Message]:
    if config.training.engine != "megatron":
        return []
    over, sent, found = links(config, copies, gpu), traffic(config, copies), []
    for kind in KINDS:
        of_kind = [one for one in sent if one.kind == kind]
        if not of_kind:
            continue
        calls, size = sum(one.calls for one in of_kind), sum(one.size_bytes for one in of_kind)
        rate = over[kind].bytes_per_s
        seconds = Range(
            size / (rate * LINKS.slow) + calls * LATENCY_S.slow, size / (rate * LINKS.fast) + calls * LATENCY_S.fast
        )
        found.append(Message(kind, "network" if over[kind].is_network else "link", calls, size, seconds))
    return found


def _compute(config: Config, copies: int, gpu: Gpu) -> Range:
    """Seconds of a step in which the busiest stage computes."""
    matmul, attention, memory = _parts(config, gpu)
    parallel = config.parallel
    tokens = config.training.global_batch_size * config.data.sequence_length
    share = tokens / (copies * parallel.context * parallel.tensor)
    layers = config.model.num_layers
    stages = parts(parallel, layers)
    most = max(sum(len(part) for part in stages[stage :: parallel.pipeline]) for stage in range(parallel.pipeline))
    # The head is one of the last stage's; the blocks of the fullest one.
    scale = share * max(most / layers, 1 / parallel.pipeline)
    return Range(
        scale * (matmul.slow * (1 + OTHER.slow) + attention.slow + memory.slow),
        scale * (matmul.fast * (1 + OTHER.fast) + attention.fast + memory.fast),
    )


def _parts(config: Config, gpu: Gpu) -> tuple[Range, Range, Range]:
    """Seconds of one GPU for one token, by part."""
    done, peak = flops.performed(config), gpu.peak(config.training.precision)
    by_kernels = gpu.has_kernels and has_kernels(Place(config, 1, 0, 0))
    # Without kernels the memory is in float32, whatever the model is in.
    of_memory, memory_peak = (MEMORY, peak) if by_kernels else (MEMORY_TORCH, max(gpu.float32, peak / 4))
    return (
        MATMUL.map(lambda share: done.matmul / (peak * share)),
        ATTENTION.map(lambda share: done.attention / (peak * share)),
        of_memory.map(lambda share: done.memory / (memory_peak * share)),
    )


def _memory_share(config: Config, gpu: Gpu) -> Range:
    matmul, attention, memory = _parts(config, gpu)
    return Range(
        memory.slow / (matmul.slow * (1 + OTHER.slow) + attention.slow + memory.slow),
        memory.fast / (matmul.fast * (1 + OTHER.fast) + attention.fast + memory.fast),
    )
