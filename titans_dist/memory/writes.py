"""The writes of a group of chunks, one chunk after another, for every memory.

A chunk needs to know where its gradients are taken and what its tokens see; what it adds is the same for all.
`fused` does the same for the plain memories, faster.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from titans_dist.memory import channels
from titans_dist.memory.gates import ChunkGates, read_before
from titans_dist.memory.network import Norm, descent
from titans_dist.memory.retention import at_chunk_end, link
from titans_dist.memory.spec import MemorySpec

Slots = list[Tensor]


@dataclass
class Pairs:
    """What N chunks write: k, v (N, G, b, D), alpha and delta (N, G, b); `document` (N, G, b) as in `chunk_gates`."""

    k: Tensor
    v: Tensor
    alpha: Tensor | None
    delta: Tensor | None
    document: Tensor | None

    def chunk(self, n: int) -> Pairs:
        return Pairs(*(None if x is None else x[n] for x in vars(self).values()))  # type: ignore[arg-type]

    def rows(self, rows: slice) -> Pairs:
        return Pairs(*(None if x is None else x[:, rows] for x in vars(self).values()))  # type: ignore[arg-type]


@dataclass
class Carry:
    """A MemoryState in the shape the loops work on: per layer its slots W and, with momentum, S (G, d_in, d_out).

    Inside a chunk also its anchor (G, d_in, d_out) per layer, and `kept` (G,).
    """

    slots: list[Slots]
    anchor: list[Tensor] | None
    kept: Tensor | None
    position: int


@dataclass
class Written:
    """What the reads need of N chunks, one list entry per layer.

    slots (N, G, d_in, d_out), m of them: the past that tokens see; inputs (N, G, b, d_in) and deltas (N, G, b, d_out):
    what the chunk writes, at the scale `rho` (N, G, b, 1); gates: how these are seen where not as they are written;
    fresh (N, G, d_in, d_out): the memory after the chunk.
    """

    slots: list[Slots]
    inputs: list[Tensor]
    deltas: list[Tensor]
    carry: Carry
    rho: list[Tensor] | None = None
    gates: ChunkGates | None = None
    fresh: list[Tensor] | None = None


def write_chunks(
    spec: MemorySpec,
    pairs: Pairs,
    gates: ChunkGates,
    norm: Norm | None,
    carry: Carry,
    start: list[Slots],
    chunk_size: int,
    read: str,
) -> Written:
    """Write all chunks of `pairs` in order. `start`: slots a document begins with, used where `pairs.document` is."""
    earlier = read_before(gates, pairs.document) if spec.is_delta_rule and spec.has_chunked_form else gates
    chunks = []
    for n, (chunk_gates, before) in enumerate(zip(gates.unbind(), earlier.unbind(), strict=True)):
        chunk, carry = _write_chunk(spec, pairs.chunk(n), chunk_gates, before, norm, carry, start, chunk_size, read)
        chunks.append(chunk)

    def stacked(name: str) -> Any:
        parts = [getattr(chunk, name) for chunk in chunks]
        return None if parts[0] is None else _stack(parts)

    seen = [chunk.gates for chunk in chunks if chunk.gates is not None]
    return Written(
        stacked("slots"),
        stacked("inputs"),
        stacked("deltas"),
        carry,
        stacked("rho"),
        replace(seen[0], past=torch.stack([g.past for g in seen])) if seen else None,
        stacked("fresh"),
    )


def _write_chunk(
    spec: MemorySpec,
    pairs: Pairs,
    gates: ChunkGates,
    before: ChunkGates,
    norm: Norm | None,
    carry: Carry,
    start: list[Slots],
    chunk_size: int,
    read: str,
) -> tuple[Written, Carry]:
    slots, anchor, kept = carry.slots, carry.anchor, carry.kept
    if anchor is None or kept is None:  # the chunk begins here
        anchor, kept = [x[0] for x in slots], torch.ones_like(pairs.k[:, 0, 0])
    begins = [x[0] for x in start]
    new = None if pairs.document is None else pairs.document > 0
    past = slots if new is None else [[*x, *s] for x, s in zip(slots, start, strict=True)]
    seen, rho, seen_gates = past, None, None
    if spec.is_delta_rule and spec.has_chunked_form:
        inputs, deltas = [pairs.k], [_solve_deltas(spec, pairs, past[0], before)]
    elif spec.retention == "kl":
        inputs, deltas, anchor, seen, seen_gates, new = _on_simplex(
            spec, pairs, gates, norm, carry.position == 0, anchor, begins, past, read
        )
    else:
        inputs, deltas = _anchored(spec, anchor, begins, new, pairs, norm)
        if not spec.is_linear and spec.retention != "elastic_net":
            seen, rho = _linked(spec, slots, anchor, kept, start, new)
    write = channels.write if spec.channel_wise else write_slots
    slots = [write(spec, i, *layer, gates) for i, layer in enumerate(zip(past, inputs, deltas, strict=True))]
    if new is not None:
        anchor = [torch.where(new[:, -1, None, None], b, a) for a, b in zip(anchor, begins, strict=True)]
        kept = torch.where(new[:, -1], 1.0, kept)
    position = (carry.position + pairs.k.shape[1]) % chunk_size
    fresh = None
    if position:
        after = Carry(slots, anchor, kept if spec.channel_wise else kept * gates.kept[:, -1], position)
    else:
        slots = [[at_chunk_end(spec, w, chunk_size), *rest] for w, *rest in slots]
        after = Carry(slots, None, None, 0)
        fresh = None if spec.is_linear else [link(spec, w)[0] for w, *_ in slots]
    return Written(seen, inputs, deltas, after, rho, seen_gates, fresh), after


def write_slots(spec: MemorySpec, layer: int, past: Slots, a: Tensor, delta: Tensor, gates: ChunkGates) -> Slots:
    """One layer's slots (G, d_in, d_out) after a chunk: the past mixed, and the sum of outer products."""
    mixed = torch.einsum("gnm,gmio->ngio", gates.keep, torch.stack(past, 1))
    spread = [gate.unsqueeze(-1) * delta for gate in gates.add.unbind(-1)]
    return [torch.baddbmm(x, a.mT, d) for x, d in zip(mixed, spread, strict=True)]


def _stack(parts: list[Any]) -> Any:
    """Lists of lists of tensors, one per chunk -> the same with the chunks stacked."""
    if isinstance(parts[0], Tensor):
        return torch.stack(parts)
    return [_stack(list(layer)) for layer in zip(*parts, strict=True)]


def _anchored(
    spec: MemorySpec, anchor: list[Tensor], begins: list[Tensor], new: Tensor | None, pairs: Pairs, norm: Norm | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and deltas at the chunk's anchor; of documents that are `new` (G, b) in it, at what they begin with."""

    def at(memory: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        weights = [link(spec, a)[0] for a in memory]
        if spec.decay == "before" and pairs.alpha is not None:  # chunks of one token
            weights = [w * (1 - pairs.alpha).unsqueeze(-1) for w in weights]
        return descent(spec, weights, pairs.k, pairs.v, pairs.delta, norm)

    inputs, deltas = at(anchor)
    if new is None:
        return inputs, deltas
    others = at(begins)

    def chosen(new_ones: list[Tensor], old_ones: list[Tensor]) -> list[Tensor]:
        return [torch.where(new.unsqueeze(-1), a, b) for a, b in zip(new_ones, old_ones, strict=True)]

    return chosen(others[0], inputs), chosen(others[1], deltas)


def _linked(
    spec: MemorySpec,
    slots: list[Slots],
    anchor: list[Tensor],
    kept: Tensor,
    start: list[Slots],
    new: Tensor | None,
) -> tuple[list[Slots], list[Tensor]]:
    """What tokens see of a memory that is a link: see `retention`. Slots of the past, and rho (G, b, 1)."""

    def visible(x: Slots, a: Tensor, kept: Tensor | float) -> tuple[Slots, Tensor]:
        w, rho = link(spec, a)
        assert rho is not None
        return [rho * x[0] + kept * (w - rho * a), *(rho * s for s in x[1:])], rho

    seen, rhos = [], []
    for x, a, s in zip(slots, anchor, start, strict=True):
        past, rho = visible(x, a, kept[:, None, None])
        if new is not None:
            others, other_rho = visible(s, s[0], 1.0)
            past, rho = [*past, *others], torch.where(new.unsqueeze(-1), other_rho, rho)
        seen.append(past)
        rhos.append(rho)
    return seen, rhos


def _on_simplex(
    spec: MemorySpec,
    pairs: Pairs,
    gates: ChunkGates,
    norm: Norm | None,
    is_first: bool,
    anchor: list[Tensor],
    begins: list[Tensor],
    past: list[Slots],
    read: str,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Slots], ChunkGates, Tensor | None]:
    """A chunk of retention="kl": its first token is exact, the rest is written, and all is read, at the memory it left.

    Returns inputs, deltas, the new anchor, the memories that tokens see with the gates that choose one for each, and
    the documents that are new after the chunk's first token.
    """
    assert gates.write is not None
    new = None if pairs.document is None else pairs.document > 0
    memories = []
    if is_first:
        first = pairs.rows(slice(0, 1))
        start_now = None if new is None else new[:, :1]
        inputs, deltas = _anchored(spec, anchor, begins, start_now, first, norm)
        at_first, first_write = anchor, gates.write[:, :1, :1]
        if start_now is not None:
            at_first = [torch.where(start_now.unsqueeze(-1), b, a) for a, b in zip(anchor, begins, strict=True)]
        anchor = [
            _mixed(gates.past[:, :1], x) + first_write * (a.mT @ d)
            for x, a, d in zip(past, inputs, deltas, strict=True)
        ]
        new = None if pairs.document is None else pairs.document > pairs.document[:, :1]
        rest = pairs.rows(slice(1, None))
        others = _anchored(spec, anchor, begins, None if new is None else new[:, 1:], rest, norm)
        inputs, deltas = (
            [torch.cat(both, 1) for both in zip(one, other, strict=True)]
            for one, other in zip((inputs, deltas), others, strict=True)
        )
        memories.append(at_first)
    else:
        inputs, deltas = _anchored(spec, anchor, begins, new, pairs, norm)
    chosen = torch.zeros_like(pairs.k[..., 0])  # which memory each token sees
    if is_first:
        chosen += 1
        if read != "after":
            chosen[:, 0] = 0
    memories.append(anchor)
    if new is not None:
        chosen = torch.where(new, float(len(memories)), chosen)
        memories.append(begins)
    past_gates = torch.nn.functional.one_hot(chosen.long(), len(memories)).to(pairs.k.dtype)
    seen = [[link(spec, a)[0] for a in layer] for layer in zip(*memories, strict=True)]
    return inputs, deltas, anchor, seen, replace(gates, past=past_gates, write=None), new


def past_product(x: Tensor, slots: Slots, gates: Tensor) -> Tensor:
    """sum_m gates_m (x X_m): x (..., b, d_in), slots (..., d_in, d_out), gates (..., b, m) -> (..., b, d_out)."""
    each = list(zip((gate.unsqueeze(-1) for gate in gates.unbind(-1)), slots, strict=True))
    if slots[0].shape[-2] > slots[0].shape[-1]:  # a gate's product is cheaper on the narrower side
        return sum((gate * (x @ slot) for gate, slot in each[1:]), each[0][0] * (x @ each[0][1]))
    z = (each[0][0] * x) @ each[0][1]
    for gate, slot in each[1:]:
        z = torch.baddbmm(z.flatten(0, -3), (gate * x).flatten(0, -3), slot.flatten(0, -3)).view_as(z)
    return z


def _mixed(past: Tensor, slots: Slots) -> Tensor:
    """sum_m past_m x_m for gates (G, 1, m) and slots (G, d_in, d_out)."""
    return sum((gate.unsqueeze(-1) * x for gate, x in zip(past.unbind(-1), slots, strict=True)), past.new_zeros(()))


def _solve_deltas(spec: MemorySpec, pairs: Pairs, past: Slots, before: ChunkGates) -> Tensor:
    """Deltas (G, b, D) of the delta rule, each at the memory its own token finds: the WY form.

    delta_t = 2 (v_t - c_t k_t W_{t-1}) with k_t W_{t-1} = sum_m past_tm k_t X_m + sum_{i<t} write_ti (k_t k_i) delta_i
    is a triangular system; c_t = 1 - alpha_t where the gradient is taken after forgetting.
    """
    assert before.write is not None
    k = pairs.k
    decay = (1 - pairs.alpha).unsqueeze(-1) if spec.decay == "before" and pairs.alpha is not None else 1.0
    known = past_product(k, past, before.past)
    system = 2 * decay * before.write * (k @ k.mT)  # strictly lower triangular; the diagonal of ones is implied
    return torch.linalg.solve_triangular(system, 2 * (pairs.v - decay * known), upper=False, unitriangular=True)
