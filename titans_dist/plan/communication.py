"""What a process will send in one optimizer step, from sizes alone.

It says once more what the model and `titans_dist.parallel` do, in numbers. A test counts the real calls and compares.
`titans_dist.parallel.communication` defines what counts as sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, lcm

from titans_dist.config import Config, ConfigError
from titans_dist.config.layout import context_groups, context_mode
from titans_dist.config.sizes import memory_weights
from titans_dist.plan.parameters import learned_gates, part_parameters
from titans_dist.plan.place import FLOAT32, Place, padded

KINDS = ("tensor", "context", "pipeline", "data", "control")
"""What is sent for the sake of each way to split the work; control: the loss, the gradient norm, flags."""

FLOAT64 = 8
BUCKET, PER_COPY = 40_000_000, 1_000_000
"""megatron-core's smallest gradient bucket, in elements, and what each copy of the model adds to it."""


@dataclass(frozen=True)
class Traffic:
    """Calls of one operation for one purpose, and the bytes that one process sends with all of them."""

    kind: str
    operation: str
    what: str
    calls: int
    size_bytes: float

    def times(self, count: int) -> Traffic:
        """The same, `count` times."""
        return replace(self, calls=self.calls * count, size_bytes=self.size_bytes * count)


def analytic(config: Config, data_size: int, stage: int = 0, share: int = 0) -> list[Traffic]:
    """What the process of pipeline `stage` with the `share`-th part of each sequence sends in one optimizer step.

    `data_size` copies of the model share the batch. Raises ConfigError for training.engine=deepspeed, which
    communicates otherwise. Not in it: messages of kind control.
    """
    if config.training.engine != "megatron":
        raise ConfigError(
            f"what training.engine={config.training.engine} sends is not worked out; use training.engine=megatron"
        )
    if config.model.num_heads < config.parallel.tensor:
        raise ConfigError(
            f"what parallel.tensor={config.parallel.tensor} sends for a memory of model.num_heads="
            f"{config.model.num_heads} is not worked out; use as many heads"
        )
    place = Place(config, data_size, stage, share)
    traffic = [one.times(place.micro_batches) for one in _micro_batch(place)]
    return [one for one in [*traffic, *_gradients(place)] if one.calls]


def busiest(config: Config, data_size: int) -> list[Traffic]:
    """`analytic` of the process that sends most."""
    parallel = config.parallel
    places = [(stage, share) for stage in range(parallel.pipeline) for share in range(parallel.context)]
    every = [analytic(config, data_size, *place) for place in places]
    return max(every, key=lambda traffic: sum(one.size_bytes for one in traffic))


def _micro_batch(place: Place) -> Iterator[Traffic]:
    """Forward and backward pass of one micro-batch through all parts of the model that the process holds."""
    forward = [*_tensor_forward(place), *_context_forward(place)]
    backward = [*_tensor_backward(place), *_context_backward(place)]
    again: list[Traffic] = []
    if place.config.training.recompute == "full":
        # The forward pass is done again until what the backward pass needs is there: all but the sum at the MLP's end.
        again = [replace(one, what=f"{one.what}, recomputed") for one in forward if one.what != "mlp: sum"]
    for blocks, is_first, is_last in place.own:
        yield from (one.times(blocks) for one in [*forward, *again, *backward])
        yield from _ends(place, is_first, is_last)
        sequence = place.config.parallel.tensor if place.is_sequence_parallel else 1
        for what, is_there in (("activations", not is_last), ("their gradients", not is_first)):
            if is_there:
                yield Traffic("pipeline", "send", what, 1, place.residual / sequence)


# Tensor parallelism


def _regions(place: Place) -> Iterator[tuple[str, int, float]]:
    """(name, calls, bytes of all of them) of what is summed over tensor-parallel processes in one block.

    Each is gathered by the norm at a region's entrance, and summed by the row-parallel layer at its end.
    """
    model = place.config.model
    yield "mixer", 1, place.residual
    yield "mlp", 1, place.residual
    if model.variant == "mal":
        yield "memory to attention", 1, place.residual
        if model.persistent_tokens:
            tokens = model.persistent_tokens * model.hidden_size * place.width
            yield "memory to attention, persistent tokens", 1, tokens
    if model.variant == "mac":
        calls = _segments(place)
        yield "memory to attention, by segments", calls, place.residual
        yield "attention to memory, by segments", calls, place.residual


def _segments(place: Place) -> int:
    """Calls of what MAC does once per segment."""
    parallel = place.config.parallel
    groups = context_groups(parallel, place.rows, 1) if parallel.context > 1 else 1
    return groups * ceil(place.tokens / place.config.model.segment_length)


def _over_tensor(place: Place, operation: str, what: str, calls: int, size_bytes: float) -> Traffic:
    return _collective("tensor", operation, what, calls, size_bytes, place.config.parallel.tensor)


def _tensor_forward(place: Place) -> Iterator[Traffic]:
    for name, calls, size in _regions(place):
        if place.is_sequence_parallel:
            yield _over_tensor(place, "all_gather", f"{name}: gather", calls, size)
            yield _over_tensor(place, "reduce_scatter", f"{name}: sum", calls, size)
        else:
            yield _over_tensor(place, "all_reduce", f"{name}: sum", calls, size)


def _tensor_backward(place: Place) -> Iterator[Traffic]:
    model = place.config.model
    for name, calls, size in _regions(place):
        if place.is_sequence_parallel:
            yield _over_tensor(place, "all_gather", f"{name}: gather of gradients", calls, size)
            yield _over_tensor(place, "reduce_scatter", f"{name}: sum of gradients", calls, size)
        else:
            yield _over_tensor(place, "all_reduce", f"{name}: sum of gradients", calls, size)
    if place.is_sequence_parallel:
        return
    if model.persistent_tokens:
        size = model.persistent_tokens * model.hidden_size * place.width
        yield _over_tensor(place, "all_reduce", "persistent tokens: sum of gradients", 1, size)
    if model.has_memory and model.memory.channel_wise:
        calls = _gate_calls(place) * learned_gates(model)
        size = calls * model.memory.gate_rank * model.hidden_size * place.width
        yield _over_tensor(place, "all_reduce", "low ranks of the gates: sum of gradients", calls, size)


def _gate_calls(place: Place) -> int:
    """How often a block asks for gates."""
    model = place.config.model
    persistent = 1 if model.persistent_tokens else 0
    if model.variant == "mac":
        return persistent + _segments(place)
    if not model.memory.is_tnt:
        return persistent + 1
    shards, rest = divmod(place.tokens, model.memory.shard_size)
    return persistent + 1 + (shards > 0) + (rest > 0)


def _ends(place: Place, is_first: bool, is_last: bool) -> Iterator[Traffic]:
    """Embedding, head and loss."""
    if is_first:
        if place.is_sequence_parallel:
            yield _over_tensor(place, "reduce_scatter", "embedding: sum", 1, place.residual)
            yield _over_tensor(place, "all_gather", "embedding: gather of gradients", 1, place.residual)
        else:
            yield _over_tensor(place, "all_reduce", "embedding: sum", 1, place.residual)
    if is_last:
        if place.is_sequence_parallel:
            yield _over_tensor(place, "all_gather", "head: gather", 1, place.residual)
            yield _over_tensor(place, "reduce_scatter", "head: sum of gradients", 1, place.residual)
        else:
            yield _over_tensor(place, "all_reduce", "head: sum of gradients", 1, place.residual)
        # The largest logit, that of the target, and the sum of the exponentials, of each token.
        losses = 3 * place.rows * place.tokens * FLOAT32
        yield _over_tensor(place, "all_reduce", "loss: over the vocabulary", 3, losses)


# Context parallelism


def _over_context(place: Place, operation: str, what: str, size_bytes: float, calls: int = 1) -> Traffic:
    return _collective("context", operation, what, calls, size_bytes, place.config.parallel.context)


def _context_forward(place: Place) -> Iterator[Traffic]:
    return _context(place, is_forward=True)


def _context_backward(place: Place) -> Iterator[Traffic]:
    return _context(place, is_forward=False)


def _context(place: Place, is_forward: bool) -> Iterator[Traffic]:
    """What one block sends to processes with other parts of its sequences."""
    model = place.config.model
    if place.config.parallel.context == 1:
        return
    if model.variant == "mac":
        yield from _ring(place, is_forward)
        return
    if model.variant == "transformer":
        whole = place.config.parallel.context * _keys_values(place, place.tokens)
        yield _over_context(place, *_gather("keys and values", is_forward), whole)
    elif model.variant in ("swa", "mag", "mal"):
        for hop in range(1, place.config.parallel.context):
            count = min(place.tokens, model.window - 1 - (hop - 1) * place.tokens)
            if count > 0 and _has_neighbor(place, hop, is_forward):
                what = _named("keys and values of the window", is_forward)
                yield Traffic("context", "send", what, 1, _keys_values(place, count))
    if not model.has_memory:
        return
    if model.conv_kernel > 1 and _has_neighbor(place, 1, is_forward):
        size = place.rows * (model.conv_kernel - 1) * 3 * place.hidden * place.width
        yield Traffic("context", "send", _named("last inputs of the convolutions", is_forward), 1, size)
    form = {"heads": _heads, "ring": _ring, "scan": _scan}[context_mode(place.config)]
    yield from form(place, is_forward)


def _keys_values(place: Place, tokens: int) -> int:
    model = place.config.model
    channels = model.kv_heads * model.head_dim // place.config.parallel.tensor
    return place.rows * tokens * 2 * channels * place.width


def _has_neighbor(place: Place, hop: int, is_forward: bool) -> bool:
    """Whether there is a process `hop` shares on, or back, that a message goes to."""
    return 0 <= place.share + (hop if is_forward else -hop) < place.config.parallel.context


def _heads(place: Place, is_forward: bool) -> Iterator[Traffic]:
    """q, k, v and the gates of this process's tokens for those of its heads; and the memory's output back."""
    model = place.config.model
    memory, positions = model.memory, place.rows * place.tokens
    optional = sum((memory.choice("retention") != "none", memory.choice("momentum"))) + 1
    per_token = optional * (place.hidden if memory.channel_wise else place.heads)
    per_token += place.heads * ((memory.choice("bias") == "huber") + (place.config.data.documents == "packed"))
    mixed = 3 * positions * place.hidden * place.width
    gates = positions * per_token * FLOAT32
    what = _named("queries, keys, values and gates for heads", is_forward)
    if place.width == FLOAT32:
        yield _over_context(place, "all_to_all", what, mixed + gates)
    else:  # gates are always float32; those that nobody learns have no gradient
        yield _over_context(place, "all_to_all", what, mixed)
        if is_forward or learned_gates(model) or memory.choice("bias") == "huber":
            yield _over_context(place, "all_to_all", what, gates)
    what = _named("the memory's output for tokens", is_forward)
    yield _over_context(place, "all_to_all", what, positions * place.hidden * place.width)


def _ring(place: Place, is_forward: bool) -> Iterator[Traffic]:
    """The state of every group over every border; where gradients are limited, the norm that they are compared with."""
    model, parallel = place.config.model, place.config.parallel
    memory = model.memory
    state = place.heads * memory_weights(memory, model.head_dim) * (2 if memory.choice("momentum") else 1)
    if model.variant == "mac":
        state += 4 * (model.conv_kernel - 1) * place.hidden  # of q, k and v, and of the queries that retrieve
    if _has_neighbor(place, 1, is_forward):
        groups = context_groups(parallel, place.rows, 1 if model.variant == "mac" else place.heads)
        what = _named("state of the memory", is_forward)
        yield Traffic("context", "send", what, groups, place.rows * state * FLOAT32)
    if not is_forward and memory.state_grad_clip is not None:
        size = place.rows * place.heads * FLOAT64
        yield _over_context(place, "all_reduce", "limit of the state's gradients", size)


def _scan(place: Place, is_forward: bool) -> Iterator[Traffic]:
    """The affine map of every share: for a state of z rows and d columns, z (z + d) numbers of each head."""
    columns = place.config.model.head_dim
    rows = columns * (2 if place.config.model.memory.choice("momentum") else 1)
    own = place.rows * place.heads * rows * (rows + columns) * FLOAT32
    yield _over_context(place, *_gather("maps of the memory", is_forward), place.config.parallel.context * own)


def _gather(what: str, is_forward: bool) -> tuple[str, str]:
    return ("all_gather" if is_forward else "reduce_scatter"), _named(what, is_forward)


def _named(what: str, is_forward: bool) -> str:
    return what if is_forward else f"{what}: gradients"


# Once per step


def _gradients(place: Place) -> Iterator[Traffic]:
    """Sums of gradients, and the parameters that come of them."""
    model, parallel = place.config.model, place.config.parallel
    tensor, copies = parallel.tensor, place.data_size * parallel.context
    if place.is_sequence_parallel:
        replicated = sum(p.numel for part in place.own for p in part_parameters(model, *part) if not p.is_split)
        what = "norms and persistent tokens: sum of gradients"
        yield _over_tensor(place, "all_reduce", what, 1, replicated * FLOAT32)
    if model.tie_embeddings and parallel.pipeline > 1 and place.stage in (0, parallel.pipeline - 1):
        size = model.vocab_size * model.hidden_size // tensor * FLOAT32
        yield _collective("pipeline", "all_reduce", "tied embedding: sum of gradients", 1, size, 2)
    sizes = [size for part in place.own for size in buckets(place, part)]
    for operation, what, width in (
        ("reduce_scatter", "sum of gradients", FLOAT32),
        ("all_gather", "parameters", place.width),
    ):
        yield _collective("data", operation, what, len(sizes), sum(sizes) * width, copies)


def buckets(place: Place, part: tuple[int, bool, bool]) -> list[int]:
    """Elements of each gradient bucket of megatron-core, with its padding, of one part of the model."""
    model, parallel, training = place.config.model, place.config.parallel, place.config.training
    copies = place.data_size * parallel.context
    is_bucketed = place.stage == 0 and not training.carry_state
    largest = max(BUCKET, PER_COPY * place.data_size) if is_bucketed else None
    blocks, is_first, is_last = part
    sizes = [p.on_one(parallel.tensor) for p in part_parameters(model, blocks, is_first, is_last)]
    # A tied weight that two parts hold is alone in a bucket.
    is_shared = model.tie_embeddings and is_first != is_last
    alone = {0 if is_first else len(sizes) - 1} if is_shared else set()
    found, filled = [], 0
    for i, size in reversed(list(enumerate(sizes))):
        filled = padded(filled, 64)
        if i in alone and filled:
            found.append(filled)
            filled = 0
        filled += size
        if i in alone or (largest is not None and filled >= largest):
            found.append(filled)
            filled = 0
    return [padded(bucket, lcm(copies, 128)) for bucket in (*found, filled) if bucket]


def _collective(kind: str, operation: str, what: str, calls: int, size_bytes: float, processes: int) -> Traffic:
    """`size_bytes`: of the whole tensor, summed over the calls."""
    if processes == 1:
        return Traffic(kind, operation, what, 0, 0.0)
    share = (processes - 1) / processes
    return Traffic(kind, operation, what, calls, (2 if operation == "all_reduce" else 1) * share * size_bytes)
