"""Bytes that one process holds at its peak, by formula.

It says once more what the layers keep for the backward pass, in numbers. Tests run the real model and compare. What it
counts: every tensor that is there after the forward pass, each once. `titans_dist.plan.kept` counts those of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

from titans_dist.config import Config, ConfigError
from titans_dist.config.layout import context_groups, context_mode, uses_ring
from titans_dist.plan.communication import buckets
from titans_dist.plan.kept import Kept, block, has_kernels
from titans_dist.plan.parameters import part_parameters
from titans_dist.plan.place import FLOAT32, WORKSPACE_BYTES, Place


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at its peak, by what they are for."""

    parameters: int
    gradients: int
    optimizer: int
    """The moments, and the float32 main weights where parameters are bfloat16."""
    activations: int
    """Kept for the backward pass, of all micro-batches in flight of this stage."""
    states: int
    """Memory states kept at chunk boundaries and carried along (S, W), part of what the backward pass needs."""
    logits: int
    """The largest temporary at the head, where this stage has it."""

    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())


def memory_of(config: Config, data_size: int, stage: int = 0, share: int = 0) -> Memory:
    """Of the process of pipeline `stage` with the `share`-th part of each sequence; `data_size` copies share the batch.

    Raises ConfigError for a memory of one head shared out over tensor-parallel processes, which is not worked out.
    """
    check(config)
    place = Place(config, data_size, stage, share)
    parameters, gradients, optimizer = _weights(place)
    kept = _in_flight(place)
    logits = 0
    if any(is_last for _, _, is_last in place.own):
        logits = _at_head(place)
    return Memory(parameters, gradients, optimizer, kept.activations, kept.states, logits)


def check(config: Config) -> None:
    """Raise ConfigError for what the formulas do not cover."""
    if config.model.num_heads < config.parallel.tensor:
        raise ConfigError(
            f"what parallel.tensor={config.parallel.tensor} holds of a memory of model.num_heads="
            f"{config.model.num_heads} is not worked out; use as many heads"
        )


def workspace(config: Config, data_size: int, stage: int = 0, share: int = 0) -> int:
    """Bytes of the largest temporary inside the backward pass of one block: an estimate, not an account.

    What is worked out again is there for a while (a block, a group of chunks), and a gradient beside each tensor of it.
    """
    place, recompute = Place(config, data_size, stage, share), config.training.recompute
    mlp = 2 * place.positions * config.model.mlp_size // config.parallel.tensor * place.width
    again = _inside_memory(place) if config.model.has_memory else 0
    if recompute == "full":
        selective, kept = block(place, "selective"), block(place, recompute)
        again += selective.activations + selective.states - kept.activations - kept.states
    return max(mlp, again)


def _inside_memory(place: Place) -> int:
    """Of a group of chunks, or a call of kernels, that goes backward: gradients, and what is worked out again.

    How much there is of both at a time, in shares of what the group keeps, was fitted to the real model.
    """
    config, tokens, share = place.config, place.tokens, 1.0
    whole = block(place, "none")
    if has_kernels(place):  # on as many chunks at a time as there is room for
        again = min(WORKSPACE_BYTES, 3 * (whole.inner + whole.states))
        return 0 if config.training.recompute == "none" else again
    memory = config.model.memory
    if config.model.variant == "mac":
        tokens = min(tokens, config.model.segment_length)
    if memory.is_tnt:  # one of two memories, and all shards of it side by side
        at_once = min(place.group_tokens, memory.shard_size) / memory.shard_size
        return int((whole.inner + whole.states) / 2 * at_once * 1.25)
    if config.parallel.context > 1 and context_mode(config) == "heads":
        share = config.parallel.context
    elif uses_ring(config) and config.model.variant != "mac":
        share = context_groups(config.parallel, place.rows, place.heads)
    elif config.parallel.context > 1 and config.model.variant != "mac":  # a scan's runs go together
        share = 1 / (2 + memory.choice("momentum"))
    at_once = min(tokens, place.group_tokens) / place.tokens / share
    if config.training.recompute == "none":
        return int(whole.inner * at_once / 2)
    return int((whole.inner + whole.states) * at_once * 1.25)


def in_flight(place: Place) -> list[int]:
    """Micro-batches of each of this stage's parts whose activations are there at once, at the most."""
    parallel = place.config.parallel
    stages, count = parallel.pipeline, place.micro_batches
    if stages == 1:
        return [1]
    if parallel.virtual == 1:
        return [min(count, stages - place.stage)]
    # Interleaved: micro-batches of all parts go in groups of as many as there are stages, part after part.
    most = min(2 * (stages - place.stage - 1) + (parallel.virtual - 1) * stages + 1, count * parallel.virtual)
    return [sum(n // stages % parallel.virtual == part for n in range(most)) for part in range(parallel.virtual)]


def checkpoint_bytes(config: Config) -> int:
    """Bytes of one checkpoint: parameters, the two moments and, in bfloat16, the main weights; of the whole model."""
    sizes = [p.numel for p in part_parameters(config.model, config.model.num_layers, True, True)]
    width = 2 if config.training.precision == "bfloat16" else FLOAT32
    return sum(sizes) * (width + 2 * FLOAT32 + (FLOAT32 if width < FLOAT32 else 0))


def _weights(place: Place) -> tuple[int, int, int]:
    """Bytes of parameters, gradients and the optimizer's state."""
    training, parallel = place.config.training, place.config.parallel
    copies = place.data_size * parallel.context
    per_state = 2 * FLOAT32 + (FLOAT32 if place.width < FLOAT32 else 0)
    if training.engine == "megatron":
        # Both buffers are padded, so that every process has an equal share of every bucket.
        elements = sum(size for part in place.own for size in buckets(place, part))
        return elements * place.width, elements * FLOAT32, elements // copies * per_state
    sizes = [p.on_one(parallel.tensor) for part in place.own for p in part_parameters(place.config.model, *part)]
    elements, stage = sum(sizes), training.zero_stage
    share = -(-elements // copies)
    parameters = (share if stage == 3 else elements) * place.width
    gradients = (share if stage >= 2 else elements) * FLOAT32
    optimizer = 0 if training.offload else (share if stage >= 1 else elements) * per_state
    return parameters, gradients, optimizer


def _at_head(place: Place) -> int:
    """The most that is there at once beyond what blocks keep, from the last norm to its gradient."""
    vocabulary, width = place.config.model.vocab_size // place.config.parallel.tensor, place.width
    # The norm, its output, and what says which token was the target.
    normed = place.norm(place.sequence) + place.full
    if not place.is_gpu and width < FLOAT32:
        normed += place.sequence  # the input is there all the same, and counted with what the blocks keep
    # float32, and beside them those in the model's precision until they are converted, and their gradient after.
    loss = place.positions * vocabulary * (FLOAT32 + (width if width < FLOAT32 else 0)) + 9 * place.positions
    of_weight = vocabulary * place.config.model.hidden_size * width
    backward = place.positions * vocabulary * width + of_weight + place.full
    if place.is_gpu or width == FLOAT32:
        return normed + max(loss, backward)
    norm = 11 * place.sequence + of_weight  # on CPUs step by step, in float32
    return max(normed + max(loss, backward), norm)


def _in_flight(place: Place) -> Kept:
    """What all micro-batches in flight keep, of all parts of the model that the process holds."""
    config = place.config
    one = block(place, config.training.recompute)
    total = Kept()
    for (blocks, is_first, _), count in zip(place.own, in_flight(place), strict=True):
        each = one.times(blocks)
        if is_first:
            each += Kept(activations=8 * place.positions)
        # What the head reads; or what is sent, and kept until the micro-batch is done.
        each += Kept(activations=place.sequence)
        total += each.times(count)
    return total
