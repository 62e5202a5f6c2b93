"""What one block keeps of a micro-batch for the backward pass, tensor by tensor.

Where kernels are, their autograd functions keep inputs and little else; in torch every operation keeps its own. What
is small beside a row of the residual stream (one number per token) is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from titans_dist.config.layout import context_mode, uses_ring
from titans_dist.config.sizes import memory_weights
from titans_dist.plan.parameters import learned_gates
from titans_dist.plan.place import FLOAT32, GROUP_TOKENS, HIDDEN_KINDS, WORKSPACE_BYTES, Place, no_memory_kernels


@dataclass(frozen=True)
class Kept:
    """Bytes."""

    activations: int = 0
    states: int = 0
    inner: int = 0
    """Of the activations, those inside the memory's groups of chunks, which recompute=selective does without."""

    def __add__(self, other: Kept) -> Kept:
        return Kept(self.activations + other.activations, self.states + other.states, self.inner + other.inner)

    def times(self, count: int) -> Kept:
        """The same, `count` times."""
        return Kept(self.activations * count, self.states * count, self.inner * count)


def block(place: Place, recompute: str) -> Kept:
    """Of one block."""
    if recompute == "full":
        return Kept(place.sequence) + _in_spite_of_recompute(place)
    mlp = 4 * place.positions * place.config.model.mlp_size // place.config.parallel.tensor * place.width
    # Twice the residual stream, its norm, and the norm's output, which is the input of a region.
    outside = 2 * (place.sequence + place.norm(place.sequence) + place.full) + mlp
    return Kept(outside) + _MIXERS.get(place.config.model.variant, _memory_alone)(place, recompute)


def _memory_alone(place: Place, recompute: str) -> Kept:
    return _memory(place, recompute) + Kept(place.mine)


def _attention_only(place: Place, recompute: str) -> Kept:
    return _attention(place, None if place.config.model.variant == "transformer" else place.config.model.window)


def _memory_as_gate(place: Place, recompute: str) -> Kept:
    both = _memory(place, recompute) + _attention(place, place.config.model.window)
    return both + Kept(_gate_of_two(place))


def _memory_as_layer(place: Place, recompute: str) -> Kept:
    both = _memory(place, recompute) + _attention(place, place.config.model.window)
    # The memory's gated output, the residual-sized sum of its projection, and that after the norm.
    return both + Kept(place.mine + place.sequence + place.norm(place.sequence) + place.full)


def _gate_of_two(place: Place) -> int:
    """silu(norm(y)) * norm(m): the normal y and m, both scaled, the SiLU; m itself and the product."""
    return 7 * place.mine + 2 * _upcast(place)


def _memory_as_context(place: Place, recompute: str) -> Kept:
    model = place.config.model
    segments = ceil(place.tokens / model.segment_length)
    length = min(model.segment_length, place.tokens)
    # The queries that retrieve, and what a memory keeps that is only read: its hidden units, in float32.
    query = place.mine + (0 if place.has_layer_kernels else 2 * place.mine)
    units = 2 * model.memory.choice("expansion") * (model.memory.choice("depth") - 1) + 1
    found = units * place.mine32 + (2 * place.mine32 if model.memory.choice("residual") else 0)
    gated = _gated(place) + place.mine
    norms = 2 * (place.sequence + place.norm(place.sequence) + place.full)
    grouped = place.positions * place.width * model.kv_heads * model.head_dim // place.config.parallel.tensor
    prefix = model.persistent_tokens / length
    keys = int(2 * (2 + prefix) * grouped)
    mask = int(place.positions * length * (2 + prefix)) * place.width
    rotary = 3 * place.tokens * model.head_dim * place.width
    attention = 2 * place.mine + keys + mask + rotary + place.per_head
    written = _neural_memory(_one_segment(place), recompute)
    written = Kept(
        int(written.activations * place.tokens / length),
        written.states * segments,
        int(written.inner * place.tokens / length),
    )
    if has_kernels(place):  # the state after a segment, which the next one's queries read, is there beside its copy
        slots = 2 if model.memory.choice("momentum") else 1
        written += Kept(states=place.state // slots * segments)
    if uses_ring(place.config):
        written += Kept(states=_handed_on(place))
    # Of more than one sequence a segment is no piece of memory: each plain linear layer makes a copy of its own.
    copies = 5 * place.full if place.rows > 1 and place.config.parallel.tensor == 1 else 0
    outside = query + found + gated + norms + attention + _gate_of_two(place) + copies
    return written + persistent_memory(place, recompute) + Kept(outside)


_MIXERS = {
    "mag": _memory_as_gate,
    "mal": _memory_as_layer,
    "mac": _memory_as_context,
    "transformer": _attention_only,
    "swa": _attention_only,
}


def _in_spite_of_recompute(place: Place) -> Kept:
    """What is kept of a block that is worked out again: what goes round a ring, and what the groups of chunks begin
    with in torch, which are checkpoints inside that of the block."""
    goes_round = uses_ring(place.config)
    if goes_round and place.config.model.variant == "mac":
        return _memory_as_context(place, "selective")
    kept = _round_the_ring(place) if goes_round else Kept()
    is_torch = place.config.model.has_memory and not has_kernels(place)
    if is_torch:
        kept += Kept(3 * place.mine32)
    return kept + _states_between(place) if goes_round or is_torch else kept


def _states_between(place: Place) -> Kept:
    """Gates and states that lie between the groups of chunks; and what the persistent tokens are read by."""
    model, segments = place.config.model, 1
    if model.variant == "mac":
        place, segments = _one_segment(place), ceil(place.tokens / model.segment_length)
    found = _inner_memory(place, "selective", model.memory.chunk_size, place.tokens, place.rows)
    begin = Kept(states=place.state // place.rows if model.persistent_tokens else 0)
    return found.times(segments) + begin


def _round_the_ring(place: Place) -> Kept:
    """Copies of what each group works on and gives, and the state that it begins with."""
    return Kept(5 * place.mine, _handed_on(place))


def _handed_on(place: Place) -> int:
    """Bytes of the state that the process before has sent; the first one has that of one row, which all begin with."""
    return place.state if place.share else place.state // place.rows


def _one_segment(place: Place) -> Place:
    """The same process with sequences of one segment."""
    length = min(place.config.model.segment_length, place.tokens) * place.config.parallel.context
    data = replace(place.config.data, sequence_length=length)
    return Place(replace(place.config, data=data), place.data_size, place.stage, place.share)


# Attention


def _attention(place: Place, window: int | None) -> Kept:
    """Queries, keys, values, the output, a number per query and head, the mask where there is one, and the angles."""
    model, tokens, persistent = place.config.model, place.tokens, place.config.model.persistent_tokens
    before = place.share * tokens if window is None else min(window - 1, place.share * tokens)
    length, mask, cut = tokens + before, 0, 0
    if window is None or length <= window:
        queries, keys = tokens + (0 if before else persistent), length + persistent
        if before or place.config.data.documents == "packed":
            rows = place.rows if place.config.data.documents == "packed" else 1
            queries, mask = tokens, rows * tokens * keys
        if queries > tokens:
            cut = place.mine  # the answers without those of the persistent tokens
        queries, keys = place.rows * queries, place.rows * keys
    elif tokens <= window:
        queries, keys, mask = place.rows * tokens, place.rows * (length + persistent), tokens * (length + persistent)
    else:
        blocks = place.rows * ceil(tokens / window)
        queries, keys = blocks * window, blocks * (2 * window + persistent)
        mask = queries * (2 * window + persistent)
    grouped = model.kv_heads * model.head_dim // place.config.parallel.tensor
    channels = 2 * queries * place.hidden + 2 * keys * grouped
    angles = 2 * tokens * model.head_dim
    return Kept((channels + mask + angles) * place.width + queries * place.heads * FLOAT32 + cut)


# Memory


def _memory(place: Place, recompute: str) -> Kept:
    return _neural_memory(place, recompute) + persistent_memory(place, recompute)


def has_kernels(place: Place) -> bool:
    """Whether the memory goes by kernels."""
    model = place.config.model
    return place.is_gpu and no_memory_kernels(model.memory, model.head_dim, place.width) is None


def _neural_memory(place: Place, recompute: str) -> Kept:
    """Projections, convolutions, the memory and the gate after it; not the gated product, which its reader keeps."""
    memory = place.config.model.memory
    around = 4 * place.mine  # inputs of the convolutions and of the gate
    if place.has_layer_kernels:
        around += 3 * place.mine
    else:  # before and after SiLU; of q and k also after their normalization
        around += 8 * place.mine if place.width == FLOAT32 else 5 * place.mine
    if not has_kernels(place) and place.width < FLOAT32:
        around += 3 * place.mine32
    around += _gated(place)
    if memory.is_tnt:
        return Kept(around + 3 * place.mine) + _tnt(place, recompute)
    runs = 1
    if place.config.parallel.context > 1 and context_mode(place.config) == "scan":
        around, runs = around + _by_scan(place), 2 + memory.choice("momentum")
    found = Kept(around) + _inner_memory(place, recompute, memory.chunk_size, place.tokens, place.rows * runs)
    goes_round = uses_ring(place.config) and place.config.model.variant != "mac"
    return found + _round_the_ring(place) if goes_round else found


def _by_scan(place: Place) -> int:
    """Copies of q, k and v for each run, what the runs from the unit states give, and every share's affine map."""
    slots = 2 if place.config.model.memory.choice("momentum") else 1
    is_upcast = not has_kernels(place) and place.width < FLOAT32  # then the copies replace others
    copies = 3 * place.mine32 * slots if is_upcast else 3 * place.mine * (1 + slots)
    dim = place.config.model.head_dim
    rows = slots * dim
    maps = place.config.parallel.context * place.rows * place.heads * rows * (rows + dim) * FLOAT32
    return copies + slots * place.mine32 + maps


def _gated(place: Place) -> int:
    """The memory's output, before its norm and gate; in torch also normal, scaled, and the gate's SiLU."""
    return place.mine if place.has_layer_kernels else 4 * place.mine + _upcast(place)


def _upcast(place: Place) -> int:
    """What a head's norm keeps in float32 on CPUs."""
    return 0 if place.is_gpu or place.width == FLOAT32 else place.mine32


def _tnt(place: Place, recompute: str) -> Kept:
    """A global memory, local ones and, of the local ones, the matrix that brings queries to where keys are."""
    memory = place.config.model.memory
    assert memory.global_chunk_size is not None
    shards = max(1, place.tokens // memory.shard_size)
    whole = _inner_memory(place, recompute, memory.global_chunk_size, place.tokens, place.rows)
    local = _inner_memory(
        place, recompute, memory.chunk_size, min(memory.shard_size, place.tokens), place.rows * shards
    )
    dim = place.config.model.head_dim
    groups = ceil(min(memory.shard_size, place.tokens) / GROUP_TOKENS)
    keys = place.rows * shards * place.heads * groups * dim * dim * FLOAT32
    # Each of the three has q, k and v in float32 by itself.
    copies = 0 if place.is_gpu or place.width == FLOAT32 else 6 * place.mine32
    return whole + local + Kept(copies, keys)


def _inner_memory(place: Place, recompute: str, chunk: int, tokens: int, rows: int) -> Kept:
    """Gates, what the groups of chunks keep, and the states between them, for `rows` sequences of `tokens` each."""
    model, memory = place.config.model, place.config.model.memory
    of_gate = place.positions * place.hidden * FLOAT32 if memory.channel_wise else place.per_head
    low_rank = place.positions * memory.gate_rank * place.width if memory.channel_wise else 0
    gates = learned_gates(model) * (of_gate + low_rank) + of_gate
    gates += place.per_head if memory.choice("bias") == "huber" else 0
    state, begin = place.state // place.rows * rows, 0
    if place.config.parallel.context > 1 and context_mode(place.config) == "heads":  # whole sequences of some heads
        tokens, state = tokens * place.config.parallel.context, state // place.config.parallel.context
        if rows == 1 and model.persistent_tokens:  # of what all heads begin with, the rest is there as well
            begin = place.state // place.rows - state
    if rows > 1 and place.config.data.documents == "packed":  # what a document begins with is a copy for each sequence
        begin += state
    if place.is_gpu and no_memory_kernels(replace(memory, chunk_size=chunk), model.head_dim, place.width) is None:
        raw = place.mine if memory.choice("residual") else 0
        if recompute != "none":
            return Kept(gates + raw, _segments(place, chunk, tokens, rows) * state)
        inner = place.mine32 + place.mine
        return Kept(gates + raw + inner, ceil(tokens / chunk) * state * place.width // FLOAT32, inner)
    group = max(1, GROUP_TOKENS // chunk) * chunk
    groups = ceil(tokens / group)
    if recompute != "none":
        return Kept(gates, groups * state + begin)
    numbers, states = _traced(place, chunk)
    inner = int(numbers * place.per_head)
    return Kept(gates + inner, (states * ceil(tokens / chunk) + groups) * state + begin, inner)


def _traced(place: Place, chunk: int) -> tuple[float, int]:
    """What torch keeps inside the groups: float32 numbers of each token and head, and states of each chunk.

    The plain memories' form is written by hand, and what it keeps is read off it. The numbers of the others, which
    autograd traces, were fitted to counts of the real model.
    """
    model, memory = place.config.model, place.config.model.memory
    choice, dim = memory.choice, model.head_dim
    depth, hidden = choice("depth"), (choice("depth") - 1) * choice("expansion") * dim
    if memory.channel_wise:
        return 1.5 * memory_weights(memory, dim) + 85 * dim + 194 * chunk, 0
    if choice("anchor") == "token" and choice("bias") != "dot":
        return (6 * dim + 9 * chunk, 3) if choice("retention") == "l2" else (5 * dim + 7 * chunk, 2)
    if choice("retention") not in ("none", "l2"):
        is_simplex = choice("retention") == "kl"
        return (11 * hidden + 6 * dim + 3 * chunk, 9) if is_simplex else (15 * hidden + 7 * dim + 6 * chunk, 8)
    # Before and after the activation, the slope, the deltas and what they come from; the same of the queries. Scores,
    # decays between tokens, the sums of writes, and what both come from.
    numbers = 7 * hidden + 2 * dim + (depth + (6 if choice("momentum") else 3)) * chunk
    return numbers + (dim if choice("residual") else 0), 1


def _segments(place: Place, chunk: int, tokens: int, rows: int) -> int:
    """Calls of the kernels for one sequence, each of as many chunks as there is room for."""
    model, choice = place.config.model, place.config.model.memory.choice
    hidden = model.head_dim * (choice("expansion") if choice("depth") == 2 else 1)
    slots = choice("depth") * (2 if choice("momentum") else 1)
    tile = max(16, 1 << (chunk - 1).bit_length())
    numbers = 2 * slots * model.head_dim * hidden + (HIDDEN_KINDS * tile * hidden if choice("depth") == 2 else 0)
    count = max(1, WORKSPACE_BYTES // (rows * place.heads * numbers * place.width))
    return ceil(ceil(tokens / chunk) / count)


def persistent_memory(place: Place, recompute: str) -> Kept:
    """What every sequence begins with, of one row: the state after the persistent tokens, and that before them."""
    one, model = place.state // place.rows, place.config.model
    if not model.persistent_tokens:
        return Kept()
    # The learned weights, copied where they are to be float32, and no momentum yet.
    weights = memory_weights(model.memory, model.head_dim) * place.heads * FLOAT32
    begin = one if place.width < FLOAT32 else one - weights
    is_copied = place.rows > 1 and place.config.data.documents == "packed"
    is_traced = recompute == "none" and not has_kernels(place)
    return Kept(states=begin + (one if is_copied or is_traced else 0))
