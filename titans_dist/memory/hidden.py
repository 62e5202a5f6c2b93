"""A memory of two layers whose hidden units are shared out: each holder has columns of W_1 and the same rows of W_2.

What depends on single hidden units is worked out by their holder. What sums over hidden units, the memory's output for
the keys and for the queries of a chunk, is summed over the holders (`total`); everything after such a sum is whole, and
equal, at all of them. Where something whole enters what one holder does alone, its gradient is the sum of the holders'
(`enter`). So a chunk costs two sums forward and one backward, each of (b, D) numbers per sequence and head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from titans_dist.memory.activations import ACTIVATIONS
from titans_dist.memory.chunked import from_carry, from_chunks, pieces, read_gates, to_carry, to_chunks
from titans_dist.memory.gates import ChunkGates, chunk_gates
from titans_dist.memory.network import Norm, output, raw_descent
from titans_dist.memory.spec import MemorySpec
from titans_dist.memory.state import MemoryState
from titans_dist.memory.writes import Carry, past_product, write_slots

Change = Callable[[Tensor], Tensor]


def shared_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    spec: MemorySpec,
    alpha: Tensor | None,
    eta: Tensor | None,
    theta: Tensor,
    delta: Tensor | None,
    norm: Norm | None,
    state: MemoryState,
    chunk_size: int,
    read: str,
    recompute: bool,
    enter: Change,
    total: Change,
) -> tuple[Tensor, MemoryState]:
    """`neural_memory` where `state` holds some of the hidden units, of weights (B, H, D, n) and (B, H, n, D).

    q, k, v (B, T, H, D) and the gates are whole, and so is the result y. All holders call it together. For two layers,
    retention "none" or "l2", anchor "chunk" and gates per head.
    """
    batch, length, heads, dim = q.shape
    accumulate = torch.promote_types(q.dtype, torch.float32)
    given = [None if x is None else x.to(accumulate) for x in (q, k, v, alpha, eta, theta, delta)]
    if spec.retention == "none":
        given[3] = None
    if norm is not None:
        norm = tuple(x.to(accumulate).expand(batch, heads, dim).reshape(-1, 1, dim) for x in norm)  # type: ignore[assignment]
    carry, outputs = to_carry(state), []
    for begin, chunks, size in pieces(length, state.position, chunk_size):
        part = [None if x is None else to_chunks(x[:, begin : begin + chunks * size], chunks) for x in given]
        arguments = (spec, part, norm, carry, chunk_size, read, enter, total)
        if recompute and torch.is_grad_enabled():
            y, carry = checkpoint(_group, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            y, carry = _group(*arguments)
        outputs.append(from_chunks(y, batch, heads))
    return torch.cat(outputs, 1).to(q.dtype), from_carry(carry, batch, heads)


def _group(
    spec: MemorySpec,
    tokens: list[Any],
    norm: Norm | None,
    carry: Carry,
    chunk_size: int,
    read: str,
    enter: Change,
    total: Change,
) -> tuple[Tensor, Carry]:
    """Chunks (N, G, b, ...), written one after another and then read together: y (N, G, b, D)."""
    q, k, v, alpha, eta, theta, delta = tokens
    gates = chunk_gates(alpha, eta, theta)
    seen, own = _entered(read_gates(gates, None, read), enter), _entered(gates, enter)
    queries, keys = enter(q), enter(k)
    activation = ACTIVATIONS[spec.activation]
    past, hidden, own_deltas, deltas = [], [], [], []
    slots, anchor = carry.slots, carry.anchor
    for n, chunk in enumerate(own.unbind()):
        first, second = [layer[0] for layer in slots] if anchor is None else anchor
        units, slope = activation.with_slope(keys[n] @ first)
        of_output = None if delta is None else delta[n]
        whole = enter(raw_descent(spec, total(units @ second), k[n], v[n], of_output, norm))
        share = (whole @ second.mT) * slope
        past.append(slots)
        hidden.append(units)
        own_deltas.append(share)
        deltas.append(whole)
        pairs = ((keys[n], share), (units, whole))
        slots = [write_slots(spec, i, x, *pairs[i], chunk) for i, x in enumerate(slots)]
        position = (carry.position + keys.shape[2]) % chunk_size
        anchor = [first, second] if position else None
        kept = torch.ones_like(k[n, :, 0, 0]) if carry.kept is None else carry.kept
        carry = Carry(slots, anchor, kept * gates.kept[n, :, -1] if position else None, position)
    layers = [[torch.stack(column) for column in zip(*layer, strict=True)] for layer in zip(*past, strict=True)]
    x = activation.value(_layer(queries, layers[0], keys, torch.stack(own_deltas), seen))
    raw = total(_layer(x, layers[1], torch.stack(hidden), torch.stack(deltas), seen))
    return output(spec, q, raw, norm), carry


def _layer(x: Tensor, slots: list[Tensor], inputs: Tensor, deltas: Tensor, gates: ChunkGates) -> Tensor:
    """x W_t for every token: what the past gives, and what the chunk has written."""
    z = past_product(x, slots, gates.past)
    return z if gates.write is None else z + (gates.write * (x @ inputs.mT)) @ deltas


def _entered(gates: ChunkGates, enter: Change) -> ChunkGates:
    write = None if gates.write is None else enter(gates.write)
    return ChunkGates(enter(gates.past), write, enter(gates.keep), enter(gates.add), enter(gates.kept))
