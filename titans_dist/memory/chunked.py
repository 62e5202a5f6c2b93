"""The exact chunked dual form: one pass of matrix products per chunk, no per-token weights.

Inside a chunk every gradient is an outer product -a_{l-1}^T delta_l with delta = -dl/dz, and W_t is a known combination
of the past and those products. A query never needs W_t itself, only its product with it:

    x W_t = sum_m past_tm (x X_m) + sum_{i <= t} write_ti (x a_i^T) delta_i

Only the writes go from chunk to chunk; they leave behind the slots X of every chunk's start, and then all chunks are
read at once. (The plain memories' own form, in `fused`, reads each chunk while it is at hand.) Batch and heads are one
dimension here, G = B H; N chunks of b tokens come first.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from titans_dist.memory import channels, compiled
from titans_dist.memory.activations import ACTIVATIONS
from titans_dist.memory.fused import write_and_read
from titans_dist.memory.gates import ChunkGates, chunk_gates, read_before
from titans_dist.memory.grad_clip import StateGradClip
from titans_dist.memory.network import Norm, apply, output
from titans_dist.memory.retention import has_fresh_end, link
from titans_dist.memory.spec import MemorySpec
from titans_dist.memory.state import MemoryState
from titans_dist.memory.tokens import Tokens
from titans_dist.memory.writes import Carry, Pairs, Slots, Written, past_product, write_chunks

GROUP_TOKENS = 512
"""Tokens whose chunks are worked on together. Where `recompute` keeps only the states between groups, also those that
are recomputed together: the more, the better used the hardware and the larger the peak."""


def dual_form(
    spec: MemorySpec,
    tokens: Tokens,
    norm: Norm | None,
    state: MemoryState,
    start: MemoryState,
    chunk_size: int,
    read: str,
    recompute: bool,
    clip: StateGradClip | None,
    use_compiler: bool,
) -> tuple[Tensor, MemoryState]:
    """y (B, T, H, D) and the state after token T. `norm`: (B H, 1, D) each. Time O(T chunk_size)."""
    batch, length, heads = tokens.q.shape[:3]
    carry = to_carry(state)
    start_slots = carry.slots if start is state else to_carry(start).slots
    begins = None if tokens.starts is None else tokens.starts.any(0).tolist()
    outputs = []
    for begin, chunks, size in pieces(length, state.position, chunk_size):
        if clip is not None and (begin or clip.is_shared):
            carry.slots = clip.slots(carry.slots)
        part = tokens.part(begin, begin + chunks * size)
        if begins is not None and not any(begins[begin : begin + chunks * size]):
            part.starts = None  # the common case is the cheap one
        arguments = (spec, part, chunks, norm, carry, start_slots, chunk_size, read, use_compiler)
        if recompute and torch.is_grad_enabled():
            y, carry = checkpoint(_group, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            y, carry = _group(*arguments)
        outputs.append(y)
    return torch.cat(outputs, 1), from_carry(carry, batch, heads)


def group_chunks(chunk_size: int) -> int:
    """Chunks of a group."""
    return max(1, GROUP_TOKENS // chunk_size)


def pieces(length: int, position: int, chunk_size: int) -> list[tuple[int, int, int]]:
    """(first token, chunks, tokens of each) per group: the running chunk's rest, whole chunks, what is left."""
    head = min(length, chunk_size - position) if position else 0
    pieces = [(0, 1, head)] if head else []
    whole = (length - head) // chunk_size
    group = group_chunks(chunk_size)
    for first in range(0, whole, group):
        pieces.append((head + first * chunk_size, min(group, whole - first), chunk_size))
    done = head + whole * chunk_size
    return [*pieces, (done, 1, length - done)] if done < length else pieces


def _group(
    spec: MemorySpec,
    tokens: Tokens,
    chunks: int,
    norm: Norm | None,
    carry: Carry,
    start: list[Slots],
    chunk_size: int,
    read: str,
    use_compiler: bool,
) -> tuple[Tensor, Carry]:
    """One group of chunks: its writes one after another, then all its reads at once."""
    batch, _, heads = tokens.q.shape[:3]
    q, k, v, alpha, eta, theta, delta = (
        None if x is None else to_chunks(x, chunks) for x in list(vars(tokens).values())[:-1]
    )
    assert q is not None and k is not None and v is not None and theta is not None
    if spec.implicit:
        theta = theta / (1 + 2 * theta * k.square().sum(-1))
    document = None
    if tokens.starts is not None:
        counts = tokens.starts.unflatten(1, (chunks, -1)).transpose(0, 1).cumsum(-1)  # (N, B, b)
        document = counts.unsqueeze(2).expand(-1, -1, heads, -1).flatten(1, 2)
    if spec.channel_wise:
        by_channel = (None if alpha is None else alpha.mT, None if eta is None else eta.mT, theta.mT)
        gates = chunk_gates(*by_channel, None if document is None else document.unsqueeze(2))
    elif use_compiler and document is None:
        gates = compiled.compiled(chunk_gates)(alpha, eta, theta)
    else:
        gates = chunk_gates(alpha, eta, theta, document)
    pairs = Pairs(k, v, alpha, delta, document)
    is_plain = spec.is_linear and not spec.is_delta_rule and not spec.channel_wise and document is None
    if is_plain and use_compiler and carry.position == 0 and q.shape[2] == chunk_size:
        y, after = compiled.write_and_read(spec, q, pairs, gates, read_gates(gates, None, read), norm, carry)
        return from_chunks(y, batch, heads), after
    if is_plain and not (read == "start" and carry.position):
        raw, after = write_and_read(spec, q, pairs, gates, read_gates(gates, None, read), norm, carry, chunk_size)
        return from_chunks(output(spec, q, raw, norm), batch, heads), after
    written = write_chunks(spec, pairs, gates, norm, carry, start, chunk_size, read)
    if read == "start" and carry.anchor is not None and written.gates is None:
        began = [link(spec, a)[0].unsqueeze(0) for a in carry.anchor]
        written.slots = [[w, *x[1:]] for w, x in zip(began, written.slots, strict=True)]
    y = _read(spec, q, written, read_gates(gates, document, read) if written.gates is None else written.gates, norm)
    if written.fresh is not None and read == "after" and has_fresh_end(spec):
        y = torch.cat([y[..., :-1, :], apply(spec, written.fresh, q[..., -1:, :], norm)], -2)
    return from_chunks(y, batch, heads), written.carry


def _read(spec: MemorySpec, q: Tensor, written: Written, gates: ChunkGates, norm: Norm | None) -> Tensor:
    """f(W_t; q_t) for every token of every chunk, (N, G, b, D), layer by layer."""
    activation, x = ACTIVATIONS[spec.activation].value, q
    for i, (slots, a, d) in enumerate(zip(written.slots, written.inputs, written.deltas, strict=True)):
        if i:
            x = activation(x)
        if spec.channel_wise:
            x = channels.read(spec, i, x, slots, a, d, gates)
            continue
        z = past_product(x, slots, gates.past)
        if gates.write is not None:
            scores = gates.write * (x @ a.mT)
            if written.rho is None:
                z = torch.baddbmm(z.flatten(0, 1), scores.flatten(0, 1), d.flatten(0, 1)).view_as(z)
            else:  # the largest factor last: rho is huge where the deltas are tiny
                z = z + written.rho[i] * (scores @ d)
        x = z
    return output(spec, q, x, norm)


def read_gates(gates: ChunkGates, document: Tensor | None, read: str) -> ChunkGates:
    """The gates of what a token reads."""
    if read == "after":
        return gates
    if gates.past.dim() > 4 and document is not None:
        document = document.unsqueeze(2).expand(gates.past.shape[:-1])
    if read == "before":
        return read_before(gates, document)
    past = torch.zeros_like(gates.past)
    new = torch.zeros_like(gates.kept) if document is None else (document > 0).to(past.dtype)
    past[..., 0] = 1 - new
    if document is not None:
        past[..., past.shape[-1] // 2] = new
    return replace(gates, past=past, write=None)


def to_chunks(x: Tensor, chunks: int) -> Tensor:
    """(B, T, H, ...) -> (N, B H, b, ...)."""
    return x.unflatten(1, (chunks, -1)).transpose(0, 1).transpose(2, 3).flatten(1, 2)


def from_chunks(y: Tensor, batch: int, heads: int) -> Tensor:
    """(N, B H, b, D) -> (B, T, H, D)."""
    return y.unflatten(1, (batch, heads)).permute(1, 0, 3, 2, 4).flatten(1, 2)


def to_carry(state: MemoryState) -> Carry:
    layers = zip(*filter(None, (state.weights, state.momentum)), strict=True)
    slots = [[x.flatten(0, 1) for x in layer] for layer in layers]
    anchor = [x.flatten(0, 1) for x in state.anchor] if state.position else None
    return Carry(slots, anchor, None if state.kept is None else state.kept.flatten(), state.position)


def from_carry(carry: Carry, batch: int, heads: int) -> MemoryState:
    def apart(x: Tensor) -> Tensor:
        return x.unflatten(0, (batch, heads))

    state = MemoryState([apart(x[0]) for x in carry.slots], [apart(x[1]) for x in carry.slots if len(x) > 1])
    if carry.position and carry.anchor is not None and carry.kept is not None:
        state = replace(state, anchor=[apart(x) for x in carry.anchor], kept=apart(carry.kept), position=carry.position)
    return state
