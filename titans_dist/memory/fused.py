"""The plain memories (kept by factors alone, gradients where the chunk began), differentiated by hand.

The same as `writes` and the reads of `chunked`, several times faster: per chunk a few matrix products that write and
add in place, while its numbers are still in the cache. In the names, `g_x` is the gradient at x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from titans_dist.memory.activations import ACTIVATIONS
from titans_dist.memory.fused_descent import Descent, raw_descent
from titans_dist.memory.gates import ChunkGates
from titans_dist.memory.network import Norm
from titans_dist.memory.spec import MemorySpec
from titans_dist.memory.writes import Carry, Pairs

Tensors = Sequence[Tensor]


def write_and_read(
    spec: MemorySpec,
    q: Tensor,
    pairs: Pairs,
    gates: ChunkGates,
    seen: ChunkGates,
    norm: Norm | None,
    carry: Carry,
    chunk_size: int,
) -> tuple[Tensor, Carry]:
    """The MLP's outputs for q (N, G, b, D), and the memory after all chunks.

    For a memory with `is_linear`, no delta rule, no gates per channel and no document starts. `seen`: the gates that
    the reads go by.
    """
    depth, slots = spec.depth, len(carry.slots[0])
    gain, bias = norm if norm is not None else (None, None)
    tensors = (q, pairs.k, pairs.v, gates.keep, gates.add, seen.past, seen.write, pairs.delta, gain, bias)
    memories = [x for layer in carry.slots for x in layer]
    y, *ends = _Chunks.apply(spec, *tensors, *memories, *(carry.anchor or []))
    position = (carry.position + pairs.k.shape[2]) % chunk_size
    after = Carry(_split(ends, *[slots] * depth), None, None, 0)
    if position:
        kept = gates.kept[-1, :, -1]
        kept = kept if carry.kept is None else kept * carry.kept
        after = Carry(after.slots, carry.anchor or [x[0] for x in carry.slots], kept, position)
    return y, after


class _Chunks(torch.autograd.Function):
    """q, k, v (N, G, b, D), keep (N, G, m, m), add and past (N, G, b, m), write (N, G, b, b), delta (N, G, b), norm,
    m slots (G, d_in, d_out) per layer, anchor -> outputs (N, G, b, D), slots after the last chunk.

    Inside, the slots of a layer lie below each other, (G, m d_in, d_out): what acts on all of them is one product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        spec: MemorySpec,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keep: Tensor,
        add: Tensor,
        past: Tensor,
        write: Tensor | None,
        delta: Tensor | None,
        gain: Tensor | None,
        bias: Tensor | None,
        *memories: Tensor,
    ) -> tuple[Tensor, ...]:
        depth, m, (chunks, rows, size) = spec.depth, keep.shape[-1], k.shape[:3]
        slots, anchor = _split(memories, depth * m, len(memories) - depth * m)
        norm = None if gain is None or bias is None else (gain, bias)
        activation = ACTIVATIONS[spec.activation]
        d_ins, d_outs = [x.shape[1] for x in slots[::m]], [x.shape[2] for x in slots[::m]]
        states = [k.new_empty(chunks + 1, rows, m * i, o) for i, o in zip(d_ins, d_outs, strict=True)]
        for layer, of_layer in zip(states, _split(slots, *[m] * depth), strict=True):
            torch.cat(of_layer, 1, out=layer[0])
        # Of the keys: before the activation, after it, its slope, the deltas before that slope, the deltas -dl/dz. Of
        # the queries: before the activation, after it, their scores.
        zs, ds, reads = ([k.new_empty(chunks, rows, size, width) for width in d_outs] for _ in range(3))
        hidden, slopes, pulled, seen = ([torch.empty_like(z) for z in zs[:-1]] for _ in range(4))
        scores = [k.new_empty(chunks, rows, size, size) for _ in range(depth if write is not None else 0)]
        shifted = (k if norm is None else k + norm[1]).unbind(0)
        ones = [k.new_ones(rows, size, width) for width in d_outs[:-1]]
        gates, each_state, by_slot = _gates(keep, add, past), _each(states), [_Slots(x, m) for x in states]
        weights, each_q, each_k, each_v = _each([x.chunk(m, 2)[0] for x in states]), *(x.unbind(0) for x in (q, k, v))
        gated_k, gated_q = gated(add, k).unbind(0), gated(past, q).unbind(0)
        each_write, each_delta = (None if x is None else x.unbind(0) for x in (write, delta))
        each = [_each(x, chunks) for x in (zs, hidden, slopes, pulled, ds, reads, seen, scores)]
        for n, (own, cross, add_n, past_n) in enumerate(gates):
            z, a, slope, d_before, d, read, x_seen, score = (x[n] for x in each)
            state, after, at = each_state[n], each_state[n + 1], anchor if anchor and n == 0 else weights[n]
            inputs, limit = [each_k[n], *a], None if each_delta is None else each_delta[n]
            for i in range(depth):
                torch.bmm(inputs[i], at[i], out=z[i])
                if i + 1 < depth:
                    a[i].copy_(activation.value(z[i]))
                    slope[i].copy_(activation.pull_back(ones[i], z[i]))
            d[-1].copy_(raw_descent(spec, z[-1], shifted[n], each_v[n], limit, norm))
            for i in range(depth - 1, 0, -1):
                torch.bmm(d[i], at[i].mT, out=d_before[i - 1])
                torch.mul(d_before[i - 1], slope[i - 1], out=d[i - 1])
            x = each_q[n]
            for i, views in enumerate(by_slot):
                torch.mul(views.all[n], own, out=views.all[n + 1])
                if cross is not None:
                    views.w[n + 1].addcmul_(views.s[n], cross)
                after[i].baddbmm_((gated(add_n, inputs[i]) if i else gated_k[n]).mT, d[i])
                torch.bmm(gated(past_n, x) if i else gated_q[n], state[i], out=read[i])
                if each_write is not None:
                    read[i].baddbmm_(torch.bmm(x, inputs[i].mT, out=score[i]) * each_write[n], d[i])
                if i + 1 < depth:
                    x = x_seen[i].copy_(activation.value(read[i]))
        ctx.spec, ctx.counts = spec, (m, write is not None, delta is not None, norm is not None, bool(anchor))
        optional = [x for x in (write, delta, gain, bias) if x is not None]
        kept = (*anchor, *states, *zs, *hidden, *slopes, *pulled, *ds, *reads[:-1], *seen, *scores)
        ctx.save_for_backward(q, k, v, keep, add, past, *optional, *kept)
        ctx.set_materialize_grads(False)
        return (reads[-1], *(slot.contiguous() for layer in states for slot in layer[-1].chunk(m, 1)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_y: Tensor | None, *g_ends: Tensor | None) -> tuple[Any, ...]:
        spec, (m, has_write, has_delta, has_norm, has_anchor) = ctx.spec, ctx.counts
        depth, inner = spec.depth, spec.depth - 1
        first, optional, anchor, states, zs, hidden, slopes, pulled, ds, reads, seen, scores = _split(
            ctx.saved_tensors,
            *(6, has_write + has_delta + 2 * has_norm, has_anchor * depth, depth),
            *(depth, inner, inner, inner, depth, inner, inner, has_write * depth),
        )
        q, k, v, keep, add, past = first
        write = optional.pop(0) if has_write else None
        delta = optional[0] if has_delta else None
        norm = (optional[-2], optional[-1]) if has_norm else None
        activation, chunks = ACTIVATIONS[spec.activation], k.shape[0]
        # The adjoint of the slots, of those after a chunk and then of those before it.
        g_states = [torch.zeros_like(x[0]) for x in states]
        for layer, of_layer in zip(g_states, _split(g_ends, *[m] * depth), strict=True):
            for slot, g in zip(layer.chunk(m, 1), of_layer, strict=True):
                if g is not None:
                    slot.copy_(g)
        g_anchor, g_weights = [torch.zeros_like(x) for x in anchor], [x.chunk(m, 1)[0] for x in g_states]
        by_slot, g_by_slot = [_Slots(x, m) for x in states], [_Slots(x.unsqueeze(0), m) for x in g_states]
        weights, each_state = _each([x.chunk(m, 2)[0] for x in states]), _each(states)
        each = [_each(x, chunks) for x in (zs, hidden, slopes, pulled, ds, reads, seen, scores)]
        each_q, each_k, each_write = q.unbind(0), k.unbind(0), None if write is None else write.unbind(0)
        gated_k, gated_q = gated(add, k).unbind(0), gated(past, q).unbind(0)
        descent = Descent(spec, zs[-1], ds[-1], k, v, delta, norm)
        g_q, g_k = torch.zeros_like(q), torch.empty_like(k)
        g_keep, g_add, g_past = torch.zeros_like(keep), torch.zeros_like(add), torch.zeros_like(past)
        g_write = None if write is None else torch.zeros_like(write)
        gates, g_gates = _gates(keep, add, past), _gates(g_keep, g_add, g_past)
        each_g_y = None if g_y is None else g_y.unbind(0)
        each_g_q, each_g_k, each_g_write = g_q.unbind(0), g_k.unbind(0), None if g_write is None else g_write.unbind(0)
        for n in reversed(range(chunks)):
            z, a, slope, d_before, d, read, x_seen, score = (x[n] for x in each)
            (own, cross, add_n, past_n), (g_own, g_cross, g_add_n, g_past_n) = gates[n], g_gates[n]
            inputs, state = [each_k[n], *a], each_state[n]
            g_d, g_in = [], []
            for i, (slots, g_slots) in enumerate(zip(by_slot, g_by_slot, strict=True)):  # through the slots after it
                g_d.append(torch.bmm(gated(add_n, inputs[i]) if i else gated_k[n], g_states[i]))
                g_in.append(_back_from_gated(add_n, inputs[i], torch.bmm(d[i], g_states[i].mT), g_add_n))
                g_all, g_w = g_slots.all[0], g_slots.w[0]
                g_own.add_(torch.linalg.vecdot(g_all, slots.all[n]).unsqueeze(-1))
                if cross is None or g_cross is None:
                    g_all.mul_(own)
                else:
                    g_cross.add_(torch.linalg.vecdot(g_w, slots.s[n]).unsqueeze(-1))
                    own_w, own_s = own.unbind(1)
                    g_slots.s[0].mul_(own_s).addcmul_(g_w, cross)
                    g_w.mul_(own_w)
            if each_g_y is not None:  # through the reads
                xs, g_read = [each_q[n], *x_seen], each_g_y[n]
                for i in range(depth - 1, -1, -1):
                    g_x = _back_from_gated(past_n, xs[i], torch.bmm(g_read, state[i].mT), g_past_n)
                    g_states[i].baddbmm_((gated(past_n, xs[i]) if i else gated_q[n]).mT, g_read)
                    if each_write is not None and each_g_write is not None:
                        write_n, g_score = each_write[n], torch.bmm(g_read, d[i].mT)
                        g_d[i].baddbmm_((score[i] * write_n).mT, g_read)
                        each_g_write[n].addcmul_(g_score, score[i])
                        g_score.mul_(write_n)
                        g_x.baddbmm_(g_score, inputs[i])
                        g_in[i].baddbmm_(g_score.mT, xs[i])
                    g_read = activation.pull_back(g_x, read[i - 1]) if i else g_x
                each_g_q[n].copy_(g_read)
            # Through the gradients that were written: up through the deltas, then down through the network.
            is_first = has_anchor and n == 0
            at, g_at = (anchor, g_anchor) if is_first else (weights[n], g_weights)
            g_pulled, g_zs = [], []
            for i in range(1, depth):
                g_zs.append((g_d[i - 1] * d_before[i - 1]).mul_(activation.curvature(z[i - 1])))
                g_pulled.append(g_d[i - 1].mul_(slope[i - 1]))
                g_d[i].baddbmm_(g_pulled[-1], at[i])
            g_z = descent.back(n, g_d[-1])
            for i in range(depth - 1, -1, -1):
                g_in[i].baddbmm_(g_z, at[i].mT)
                if i:
                    left, right = torch.cat([g_pulled[i - 1], inputs[i]], 1), torch.cat([d[i], g_z], 1)
                    g_at[i].add_(torch.bmm(left.mT, right))
                    g_z = g_zs[i - 1].addcmul_(g_in[i], slope[i - 1])
                else:
                    g_at[0].add_(torch.bmm(inputs[0].mT, g_z))
            each_g_k[n].copy_(g_in[0])
        g_f, g_v, g_delta, g_norm = descent.gradients()
        g_k = g_k if g_f is None else g_k.add_(g_f)
        g_memories = [slot.contiguous() for layer in g_states for slot in layer.chunk(m, 1)]
        of_gates = (g_keep, g_add, g_past, g_write, g_delta)
        return (None, g_q, g_k, g_v, *of_gates, *(g_norm or (None, None)), *g_memories, *g_anchor)


def _split(values: Any, *counts: int) -> list[list[Any]]:
    """`values` cut into lists of these lengths."""
    rest, parts = list(values), []
    for count in counts:
        parts.append(rest[:count])
        rest = rest[count:]
    return parts


def _each(layers: Tensors, chunks: int = 0) -> list[tuple[Tensor, ...]]:
    """Per chunk, the tensors of all layers; `chunks` times nothing where there are none."""
    return list(zip(*(x.unbind(0) for x in layers), strict=True)) if layers else [()] * chunks


class _Slots:
    """Per chunk, views of a layer's states (N, G, m d_in, d_out): all slots (G, m, L), and W and S of them (G, L)."""

    def __init__(self, states: Tensor, m: int) -> None:
        whole = states.view(*states.shape[:2], m, -1)
        self.all, self.w, self.s = whole.unbind(0), whole[:, :, 0].unbind(0), whole[:, :, -1].unbind(0)


def _gates(keep: Tensor, add: Tensor, past: Tensor) -> list[tuple[Tensor, Tensor | None, Tensor, Tensor]]:
    """Per chunk what a slot keeps of itself (G, m, 1), W takes of S (G, 1), and add and past (G, b, m)."""
    own = keep.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    cross = [None] * len(keep) if keep.shape[-1] == 1 else keep[..., 0, 1, None].unbind(0)
    return list(zip(own.unbind(0), cross, add.unbind(0), past.unbind(0), strict=True))


def gated(gate: Tensor, x: Tensor) -> Tensor:
    """x (..., b, d) once per slot, each times its gate (..., b, m), side by side: (..., b, m d)."""
    return (gate.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)


def _back_from_gated(gate: Tensor, x: Tensor, grad: Tensor, g_gate: Tensor) -> Tensor:
    """`grad` at `gated`'s result -> gradient at x; that at the gate is added."""
    m = gate.shape[-1]
    by_slot, gates = grad.chunk(m, -1), gate.split(1, -1)
    for g, of_gate in zip(by_slot, g_gate.unbind(-1), strict=True):
        of_gate.add_(torch.linalg.vecdot(g, x))
    g_x = by_slot[0] * gates[0]
    return g_x if m == 1 else g_x.addcmul_(by_slot[1], gates[1])
