"""Will it fit, how fast, and what to change: one layout of a configuration on GPUs of one kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby, product
from math import log2, sqrt

from titans_dist.config import Config, ConfigError
from titans_dist.config.layout import check_world, model_size, validate_batch, validate_layout
from titans_dist.config.machines import processes
from titans_dist.plan.estimate import Estimate, estimate, gpus_per_node, links
from titans_dist.plan.hardware import Gpu
from titans_dist.plan.kept import has_kernels
from titans_dist.plan.memory import Memory, check, in_flight, memory_of, workspace
from titans_dist.plan.place import Place, no_memory_kernels

RESERVE_BYTES, FRAGMENTED = 2.5e9, 0.04
"""What the driver, its libraries and NCCL's buffers take, and the share that is lost between tensors: both guesses."""
BUBBLE = 0.2
"""From here on a bubble is worth a warning."""


@dataclass(frozen=True)
class StageMemory:
    """What the process of a pipeline stage that holds most needs, in bytes."""

    stage: int
    blocks: int
    in_flight: int
    memory: Memory
    workspace: int
    """The largest temporary of the backward pass of a block; the logits are gone by then."""
    reserve: int

    def peak(self) -> int:
        """All that is there at once."""
        rest = max(0, self.workspace - self.memory.logits)
        return self.memory.total() + rest + self.reserve


@dataclass(frozen=True)
class Plan:
    """One layout."""

    config: Config
    gpu: Gpu
    copies: int
    stages: list[StageMemory]

    @property
    def world(self) -> int:
        """GPUs."""
        return model_size(self.config.parallel) * self.copies

    @property
    def worst(self) -> StageMemory:
        """The stage that needs most."""
        return max(self.stages, key=StageMemory.peak)

    @property
    def fits(self) -> bool:
        return self.worst.peak() <= self.gpu.memory_bytes

    def estimate(self) -> Estimate:
        """How long it takes."""
        return estimate(self.config, self.copies, self.gpu)


def plan(config: Config, gpu: Gpu, copies: int) -> Plan:
    """What `copies` copies of the model need. Raises ConfigError for what the formulas do not cover."""
    if not gpu.has_kernels and config.model.memory.backend == "auto":
        config = _with(config, backend="torch")
    stages = []
    for stage in range(config.parallel.pipeline):
        share = config.parallel.context - 1  # of full attention the last one sees the most keys
        memory = memory_of(config, copies, stage, share)
        place = Place(config, copies, stage, share)
        beside = workspace(config, copies, stage, share)
        taken = memory.total() + max(0, beside - memory.logits)
        blocks = sum(one for one, _, _ in place.own)
        reserve = int(RESERVE_BYTES + FRAGMENTED * taken)
        stages.append(StageMemory(stage, blocks, sum(in_flight(place)), memory, beside, reserve))
    return Plan(config, gpu, copies, stages)


def copies_of(config: Config) -> int:
    """Copies of the model that share the batch: parallel.data, or as many as there are GPUs for.

    Raises ConfigError where the layout does not fill the cluster exactly.
    """
    if config.cluster.gpus_per_node:
        return check_world(config, processes(config))
    copies = config.parallel.data or 1
    validate_batch(config, copies)
    return copies


def bound(found: Plan) -> str:
    """The binding constraint, in words."""
    worst = found.worst
    if not found.fits:
        parts = {**vars(worst.memory), "workspace": max(0, worst.workspace - worst.memory.logits)}
        name = max(parts, key=lambda key: parts[key])
        where = f" of stage {worst.stage}" if len(found.stages) > 1 else ""
        over = worst.peak() - found.gpu.memory_bytes
        return f"memory: {over / 1e9:.1f} GB too much; the largest part is {parts[name] / 1e9:.1f} GB of {name}{where}"
    time = found.estimate()
    parts_s = {one.kind: one.seconds.slow for one in time.messages}
    middle = sqrt(time.compute_s.slow * time.compute_s.fast)
    slowest = max(parts_s, key=lambda key: parts_s[key], default=None)
    if slowest is not None and parts_s[slowest] > middle:
        return f"time: {slowest}-parallel communication"
    if time.pipeline_bubble > 0.3:
        return "time: the pipeline's bubble"
    return "time: computation"


def warnings(found: Plan) -> list[str]:
    """What is legal but probably not meant."""
    config, gpu = found.config, found.gpu
    return [*_of_kernels(config, gpu), *_of_layout(found), *_of_masks(found), *_of_limits(config)]


def _of_kernels(config: Config, gpu: Gpu) -> Iterator[str]:
    model = config.model
    if not model.has_memory:
        return
    width = 2 if config.training.precision == "bfloat16" else 4
    reason = no_memory_kernels(model.memory, model.head_dim, width)
    if not gpu.has_kernels:
        reason = f"{gpu.name} has none"
    if reason is not None:
        yield f"the memory goes without Triton kernels, several times slower: {reason}"
    if config.training.recompute == "full" and not has_kernels(Place(config, 1, 0, 0)):
        yield (
            "training.recompute=full keeps what the memory's groups of chunks begin with all the same where the memory "
            "has no kernels"
        )


def _of_layout(found: Plan) -> Iterator[str]:
    config, time = found.config, found.estimate()
    over, node = links(config, found.copies, found.gpu), gpus_per_node(config)
    for kind in ("tensor", "context"):
        if over[kind].is_network:
            yield f"parallel.{kind} goes over the network: keep tensor x context within the {node} GPUs of a node"
    if time.pipeline_bubble > BUBBLE:
        count = Place(config, found.copies, 0, 0).micro_batches
        yield (
            f"the pipeline waits {time.pipeline_bubble:.0%} of the time, with {count} micro-batches for "
            f"{config.parallel.pipeline} stages; use smaller ones, or parallel.virtual=2"
        )
    if time.ring_bubble > BUBBLE:
        yield (
            f"each process of the ring waits {time.ring_bubble:.0%} of the memory's time; "
            "raise training.micro_batch_size or parallel.context_groups"
        )
    blocks = [one.blocks for one in found.stages]
    if max(blocks) > min(blocks):
        yield f"the stages have {min(blocks)} to {max(blocks)} blocks: the others wait for the fullest"


def _of_masks(found: Plan) -> Iterator[str]:
    model, worst = found.config.model, found.worst
    if model.variant == "transformer" and found.config.parallel.context > 1:
        place = Place(found.config, found.copies, 0, found.config.parallel.context - 1)
        mask = place.tokens * found.config.data.sequence_length * place.width
        if mask > 0.1 * found.gpu.memory_bytes:
            yield (
                f"full attention over {found.config.parallel.context} shares keeps a mask of {mask / 1e9:.1f} GB per "
                "block and micro-batch; use a window (variant=swa, mag or mal)"
            )
    if worst.memory.states > 0.5 * worst.memory.activations > 1e9:
        yield f"memory states take {worst.memory.states / 1e9:.1f} GB; a smaller model.memory.expansion needs less"


def _of_limits(config: Config) -> Iterator[str]:
    if config.training.engine != "megatron":
        yield f"what training.engine={config.training.engine} sends is not worked out: the time is without it"
    if config.data.documents == "packed":
        yield "data.documents=packed: masks and cuts at documents, which depend on the data, are not in the numbers"


# Other layouts


def layouts(config: Config, world: int, gpu: Gpu) -> Iterator[Plan]:
    """Every legal layout of `world` GPUs, with every size of a micro-batch and every recompute."""
    return (plan(one, gpu, one.parallel.data or 1) for one in _legal(config, world))


def _legal(config: Config, world: int) -> Iterator[Config]:
    """tensor, context and pipeline in powers of two, and the rest copies of the model."""
    parallel, training = config.parallel, config.training
    node, layers = gpus_per_node(config), config.model.num_layers
    recomputes = dict.fromkeys((training.recompute, "none", "selective", "full"))
    for tensor, context, pipeline, rows, recompute in product(
        _powers(min(node, world)), _powers(world), _powers(layers), _powers(training.micro_batch_size), recomputes
    ):
        copies, rest = divmod(world, tensor * context * pipeline)
        if rest or not copies:
            continue
        split = replace(
            parallel, tensor=tensor, context=context, pipeline=pipeline, virtual=1, layers=None, data=copies
        )
        changed = replace(training, micro_batch_size=rows, recompute=recompute)
        candidate = replace(config, parallel=split, training=changed)
        try:
            validate_layout(candidate)
            validate_batch(candidate, copies)
            check(candidate)
        except ConfigError:
            continue
        yield candidate


def search(config: Config, world: int, gpu: Gpu, most: int = 10) -> list[tuple[Plan, Estimate]]:
    """The fastest layouts that fit, by the middle of their range."""
    found = [(one, one.estimate()) for one in layouts(config, world, gpu) if one.fits]
    found.sort(key=lambda pair: pair[1].step_s.slow * pair[1].step_s.fast)
    best: dict[tuple[int, ...], tuple[Plan, Estimate]] = {}
    for one, time in found:  # of each layout the best micro-batch and recompute
        split = one.config.parallel
        best.setdefault((split.tensor, split.context, split.pipeline), (one, time))
    return list(best.values())[:most]


def nearest(config: Config, world: int, gpu: Gpu) -> Plan | None:
    """The legal layout of as many GPUs that fits and changes least; of several the fastest."""
    near = sorted(_legal(config, world), key=lambda one: _distance(config, one))
    for _, equally_near in groupby(near, key=lambda one: _distance(config, one)):
        found = [plan(one, gpu, one.parallel.data or 1) for one in equally_near]
        fitting = [one for one in found if one.fits]
        if fitting:
            return min(fitting, key=lambda one: one.estimate().step_s.slow)
    return None


def overrides(old: Config, new: Config) -> list[str]:
    """What turns one into the other, as on the command line."""
    found = []
    for group, keys in (("parallel", ("tensor", "context", "pipeline", "virtual", "data")), ("training", _TRAINED)):
        for key in keys:
            before, after = getattr(getattr(old, group), key), getattr(getattr(new, group), key)
            if before != after and before is not None:
                found.append(f"{group}.{key}={after}")
    return found


_TRAINED = ("micro_batch_size", "recompute")


def _distance(old: Config, new: Config) -> float:
    """How much is changed: a doubling counts one, and so does another recompute."""
    steps = float(old.training.recompute != new.training.recompute)
    steps += abs(log2(old.training.micro_batch_size / new.training.micro_batch_size))
    for key in ("tensor", "context", "pipeline"):
        steps += abs(log2(getattr(new.parallel, key) / getattr(old.parallel, key)))
    return steps


def _powers(most: int) -> Iterator[int]:
    """1, 2, 4, ... up to `most`, and `most` itself."""
    n = 1
    while n < most:
        yield n
        n *= 2
    yield most


def _with(config: Config, **memory: str) -> Config:
    changed = replace(config.model.memory, **memory)  # type: ignore[arg-type]
    return replace(config, model=replace(config.model, memory=changed))
