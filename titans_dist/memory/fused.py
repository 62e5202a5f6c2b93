"""The plain memories (kept by factors alone, gradients where the chunk began), differentiated by hand.

The same as `writes` and the reads of `chunked`, several times faster: per chunk a few matrix products that write and
add in place, while its numbers are still in the cache. In the names, `g_x` is the gradient at x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_dist.memory.activations import ACTIVATIONS, Activation
from titans_dist.memory.bias import output_descent, pull_back
from titans_dist.memory.gates import ChunkGates
from titans_dist.memory.network import NORM_EPS, Norm
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
        # Of the keys: before the activation, after it, its slope, -dl/dz. Of the queries: before it, after it, scores.
        zs, ds, reads = ([k.new_empty(chunks, rows, size, width) for width in d_outs] for _ in range(3))
        hidden, slopes, seen = ([torch.empty_like(z) for z in zs[:-1]] for _ in range(3))
        scores = [k.new_empty(chunks, rows, size, size) for _ in range(depth if write is not None else 0)]
        shifted, one = k if norm is None else k + norm[1], k.new_ones(())
        each_state, gates = _each(states), _each(_chunk_gates(keep, add, past))
        each = [_each(x, chunks) for x in (zs, hidden, slopes, ds, reads, seen, scores)]
        for n in range(chunks):
            z, a, slope, d, read, x_seen, score = (x[n] for x in each)
            state, after, (own, cross, add_n, past_n) = each_state[n], each_state[n + 1], gates[n]
            at = anchor if anchor and n == 0 else [x[:, :width] for x, width in zip(state, d_ins, strict=True)]
            inputs = [k[n], *a]
            for i in range(depth):
                torch.bmm(inputs[i], at[i], out=z[i])
                if i + 1 < depth:
                    a[i].copy_(activation.value(z[i]))
                    slope[i].copy_(activation.pull_back(one.expand_as(z[i]), z[i]))
            limit = None if delta is None else delta[n]
            d[-1].copy_(_raw_descent(spec, z[-1], shifted[n], v[n], limit, norm))
            for i in range(depth - 1, 0, -1):
                torch.bmm(d[i], at[i].mT, out=d[i - 1]).mul_(slope[i - 1])
            x = q[n]
            for i, width in enumerate(d_ins):
                _mix(m, own, cross, state[i], after[i], width)
                after[i].baddbmm_(_gated(add_n, inputs[i]).mT, d[i])
                torch.bmm(_gated(past_n, x), state[i], out=read[i])
                if write is not None:
                    read[i].baddbmm_(torch.bmm(x, inputs[i].mT, out=score[i]) * write[n], d[i])
                if i + 1 < depth:
                    x = x_seen[i].copy_(activation.value(read[i]))
        ctx.spec, ctx.counts = spec, (m, write is not None, delta is not None, norm is not None, bool(anchor))
        optional = [x for x in (write, delta, gain, bias) if x is not None]
        kept = (*anchor, *states, *zs, *hidden, *slopes, *ds, *reads[:-1], *seen, *scores)
        ctx.save_for_backward(q, k, v, keep, add, past, *optional, *kept)
        ctx.set_materialize_grads(False)
        return (reads[-1], *(slot.contiguous() for layer in states for slot in layer[-1].chunk(m, 1)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_y: Tensor | None, *g_ends: Tensor | None) -> tuple[Any, ...]:
        spec, (m, has_write, has_delta, has_norm, has_anchor) = ctx.spec, ctx.counts
        depth, inner = spec.depth, spec.depth - 1
        first, optional, anchor, states, zs, hidden, slopes, ds, reads, seen, scores = _split(
            ctx.saved_tensors,
            *(6, has_write + has_delta + 2 * has_norm, has_anchor * depth, depth),
            *(depth, inner, inner, depth, inner, inner, has_write * depth),
        )
        q, k, v, keep, add, past = first
        write = optional.pop(0) if has_write else None
        delta = optional[0] if has_delta else None
        norm = (optional[-2], optional[-1]) if has_norm else None
        activation, chunks = ACTIVATIONS[spec.activation], k.shape[0]
        d_ins = [x.shape[2] // m for x in states]
        # Adjoints of the slots after a chunk and before it; the two sets of tensors take turns.
        end = [torch.zeros_like(x[0]) for x in states]
        for layer, own in zip(end, _split(g_ends, *[m] * depth), strict=True):
            for slot, g in zip(layer.chunk(m, 1), own, strict=True):
                slot.copy_(torch.zeros_like(slot) if g is None else g)
        before, g_anchor = [torch.empty_like(x) for x in end], [torch.zeros_like(x) for x in anchor]
        g_q, g_k, g_v = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
        g_delta = None if delta is None else torch.empty_like(delta)
        g_norm = None if norm is None else (torch.zeros_like(norm[0]), torch.zeros_like(norm[1]))
        g_write = None if write is None else torch.zeros_like(write)
        gates = _chunk_gates(keep, add, past)
        g_gates = [torch.zeros_like(x) for x in gates]
        each_g_gate = _each(g_gates)
        each = [_each(x, chunks) for x in (states, zs, hidden, slopes, ds, reads, seen, scores, gates)]
        for n in reversed(range(chunks)):
            chunk = _Chunk(*(x[n] for x in each))
            inputs, g_gate = [k[n], *chunk.hidden], each_g_gate[n]
            g_d, g_in = _back_from_writes(m, chunk, inputs, end, before, g_gate)
            if g_y is not None:
                own_writes = None if write is None or g_write is None else (write[n], g_write[n])
                xs = [q[n], *chunk.seen]
                g_q[n] = _back_from_reads(
                    m, activation, chunk, inputs, xs, own_writes, g_y[n], before, g_gate[-1], g_d, g_in
                )
            if has_anchor and n == 0:
                at, g_at = anchor, g_anchor
            else:
                at, g_at = ([x[:, :w] for x, w in zip(xs, d_ins, strict=True)] for xs in (chunk.state, before))
            limit = None if delta is None or g_delta is None else (delta[n], g_delta[n])
            value = (k[n], v[n], limit, norm, g_v[n], g_norm)
            g_k[n] = _back_from_descent(spec, activation, chunk, inputs, at, g_at, g_d, g_in, *value)
            end, before = before, end
        g_keep = torch.zeros_like(keep)
        g_keep.diagonal(dim1=-2, dim2=-1).copy_(g_gates[0].squeeze(-1))
        if m > 1:
            g_keep[..., 0, 1] = g_gates[1].flatten(-3)
        of_gates = (g_keep, g_gates[2].squeeze(-1), g_gates[3].squeeze(-1), g_write, g_delta)
        ends = [slot.contiguous() for layer in end for slot in layer.chunk(m, 1)]
        return (None, g_q, g_k, g_v, *of_gates, *(g_norm or (None, None)), *ends, *g_anchor)


class _Chunk(NamedTuple):
    """What the forward pass left of one chunk, per layer; see `forward`."""

    state: Tensors
    z: Tensors
    hidden: Tensors
    slope: Tensors
    d: Tensors
    read: Tensors
    seen: Tensors
    score: Tensors
    gates: Tensors


def _back_from_writes(
    m: int, chunk: _Chunk, inputs: Tensors, end: Tensors, before: Tensors, g_gates: Tensors
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients at the deltas and the inputs of every layer. Sets those at the slots, adds those at the gates."""
    own, cross, add, _ = chunk.gates
    g_d, g_in = [], []
    for a, d, state, g_end, g_state in zip(inputs, chunk.d, chunk.state, end, before, strict=True):
        width = a.shape[-1]
        _mix_back(m, own, cross, g_end, g_state, width)
        by_slot = (g_end.unflatten(1, (m, -1)).flatten(2), state.unflatten(1, (m, -1)).flatten(2))
        g_gates[0].add_(torch.linalg.vecdot(*by_slot).unsqueeze(-1))
        if m > 1:
            g_gates[1].view(-1).add_(torch.linalg.vecdot(by_slot[0][:, 0], by_slot[1][:, 1]))
        g_d.append(torch.bmm(_gated(add, a), g_end))
        g_in.append(_back_from_gated(m, add, a, torch.bmm(d, g_end.mT), g_gates[2]))
    return g_d, g_in


def _back_from_reads(
    m: int,
    activation: Activation,
    chunk: _Chunk,
    inputs: Tensors,
    xs: Tensors,
    own_writes: tuple[Tensor, Tensor] | None,
    g_z: Tensor,
    before: Tensors,
    g_past: Tensor,
    g_d: Tensors,
    g_in: Tensors,
) -> Tensor:
    """Gradient at the queries; those at the slots, the gates, the deltas and the inputs are added.

    `own_writes`: the gates of the chunk's own writes, with their gradient.
    """
    past = chunk.gates[-1]
    for i in range(len(xs) - 1, -1, -1):
        g_x = _back_from_gated(m, past, xs[i], torch.bmm(g_z, chunk.state[i].mT), g_past)
        before[i].baddbmm_(_gated(past, xs[i]).mT, g_z)
        if own_writes is not None:
            write, g_write = own_writes
            score, g_score = chunk.score[i], torch.bmm(g_z, chunk.d[i].mT)
            g_d[i].baddbmm_((score * write).mT, g_z)
            g_write.addcmul_(g_score, score)
            g_score.mul_(write)
            g_x.baddbmm_(g_score, inputs[i])
            g_in[i].baddbmm_(g_score.mT, xs[i])
        g_z = activation.pull_back(g_x, chunk.read[i - 1]) if i else g_x
    return g_z


def _back_from_descent(
    spec: MemorySpec,
    activation: Activation,
    chunk: _Chunk,
    inputs: Tensors,
    at: Tensors,
    g_at: Tensors,
    g_d: list[Tensor],
    g_in: list[Tensor],
    k: Tensor,
    v: Tensor,
    limit: tuple[Tensor, Tensor] | None,
    norm: Norm | None,
    g_v: Tensor,
    g_norm: Norm | None,
) -> Tensor:
    """Gradient at the keys; those at the weights are added. Through the deltas up, then through the network down."""
    g_zs, g_pulled = [], []
    for i in range(1, len(g_d)):
        d, slope = chunk.d[i], chunk.slope[i - 1]
        g_slope = torch.bmm(d, at[i].mT).mul_(g_d[i - 1])
        g_pulled.append(g_d[i - 1].mul_(slope))
        g_d[i].baddbmm_(g_pulled[-1], at[i])
        g_zs.append(g_slope.mul_(activation.curvature(chunk.z[i - 1])))
    g_z = _raw_descent_backward(spec, g_d[-1], chunk.z[-1], k, v, chunk.d[-1], limit, norm, g_in[0], g_v, g_norm)
    for i in range(len(g_d) - 1, -1, -1):
        g_in[i].baddbmm_(g_z, at[i].mT)
        if i:
            g_at[i].baddbmm_(torch.cat([g_pulled[i - 1], inputs[i]], 1).mT, torch.cat([chunk.d[i], g_z], 1))
            g_z = g_zs[i - 1].addcmul_(g_in[i], chunk.slope[i - 1])
        else:
            g_at[0].baddbmm_(inputs[0].mT, g_z)
    return g_in[0]


def _raw_descent(
    spec: MemorySpec, raw: Tensor, shifted: Tensor, v: Tensor, delta: Tensor | None, norm: Norm | None
) -> Tensor:
    """`raw_descent` in few operations, without a graph; `shifted` is k plus the norm's bias."""
    if norm is None:
        return output_descent(spec, raw, v, delta)
    normal, mean, rstd = torch.native_layer_norm(raw, raw.shape[-1:], None, None, NORM_EPS)
    h = output_descent(spec, torch.addcmul(shifted, normal, norm[0]), v, delta) * norm[0]
    return _through_norm(h, raw, mean, rstd)


def _raw_descent_backward(
    spec: MemorySpec,
    g: Tensor,
    raw: Tensor,
    k: Tensor,
    v: Tensor,
    descent: Tensor,
    limit: tuple[Tensor, Tensor] | None,
    norm: Norm | None,
    g_k: Tensor,
    g_v: Tensor,
    g_norm: Norm | None,
) -> Tensor:
    """From the gradient g at `raw_descent`'s result to that at `raw`: a second derivative, written out.

    With n = normal(raw), h = -gain dl/df and d = rstd (h - mean(h) - n mean(h n)) the descent: d depends on raw through
    f(n) in h, through n beside it and through rstd. Gradients at the keys and the norm are added to g_k and g_norm,
    those at the values and Huber's delta are set; `limit` is that delta with its gradient.
    """
    delta = None if limit is None else limit[0]
    if norm is None or g_norm is None:
        g_f, g_of_v, g_delta = pull_back(spec, g, raw, v, delta)
        _set(g_v, g_of_v, limit, g_delta)
        return g_f
    gain, bias = norm
    normal, mean, rstd = torch.native_layer_norm(raw, raw.shape[-1:], None, None, NORM_EPS)
    f = torch.addcmul(k + bias, normal, gain)
    outer = output_descent(spec, f, v, delta)
    g_h = _through_norm(g, raw, mean, rstd)
    g_f, g_of_v, g_delta = pull_back(spec, g_h * gain, f, v, delta)
    _set(g_v, g_of_v, limit, g_delta)
    g_k.add_(g_f)
    g_norm[0].add_((g_h * outer).addcmul_(g_f, normal).sum(1, keepdim=True))
    g_norm[1].add_(g_f.sum(1, keepdim=True))
    h, mean_gn = outer * gain, (g * normal).mean(-1, keepdim=True)
    mean_hn = (h * normal).mean(-1, keepdim=True)
    g_normal = g_f.mul_(gain).sub_((g * mean_hn).addcmul_(h, mean_gn).mul_(rstd))
    mean_gd = (g * descent).mean(-1, keepdim=True).mul_(rstd)
    return _through_norm(g_normal, raw, mean, rstd).addcmul_(mean_gd, normal, value=-1)


def _set(g_v: Tensor, g_of_v: Tensor, limit: tuple[Tensor, Tensor] | None, g_delta: Tensor | None) -> None:
    g_v.copy_(g_of_v)
    if limit is not None and g_delta is not None:
        limit[1].copy_(g_delta)


def _through_norm(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """rstd (g - mean(g) - n mean(g n)), the LayerNorm's own backward."""
    backward = torch.ops.aten.native_layer_norm_backward
    return backward(grad, x, x.shape[-1:], mean, rstd, None, None, [True, False, False])[0]


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


def _chunk_gates(keep: Tensor, add: Tensor, past: Tensor) -> list[Tensor]:
    """What a slot keeps of itself (N, G, m, 1), W takes of S (N, G, 1, 1), and add and past (N, G, b, m, 1)."""
    own = keep.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    return [own, keep[..., 0, -1, None, None], add.unsqueeze(-1), past.unsqueeze(-1)]


def _gated(gate: Tensor, x: Tensor) -> Tensor:
    """x (G, b, d) once per slot, each times its gate (G, b, m, 1), side by side: (G, b, m d)."""
    return (gate * x.unsqueeze(2)).flatten(2)


def _back_from_gated(m: int, gate: Tensor, x: Tensor, grad: Tensor, g_gate: Tensor) -> Tensor:
    """`grad` at `_gated`'s result -> gradient at x; that at the gate is added."""
    by_slot = grad.unflatten(2, (m, -1))
    g_gate.add_((by_slot * x.unsqueeze(2)).sum(-1, keepdim=True))
    g_x = by_slot[:, :, 0] * gate[:, :, 0]
    return g_x if m == 1 else g_x.addcmul_(by_slot[:, :, 1], gate[:, :, 1])


def _mix(m: int, own: Tensor, cross: Tensor, state: Tensor, out: Tensor, width: int) -> None:
    """The slots of a chunk's end before anything is added: W takes from W and S, S from itself alone."""
    torch.mul(state.unflatten(1, (m, -1)).flatten(2), own, out=out.unflatten(1, (m, -1)).flatten(2))
    if m > 1:
        out[:, :width].addcmul_(state[:, width:], cross)


def _mix_back(m: int, own: Tensor, cross: Tensor, grad: Tensor, out: Tensor, width: int) -> None:
    """The adjoint of `_mix` at the state."""
    torch.mul(grad.unflatten(1, (m, -1)).flatten(2), own, out=out.unflatten(1, (m, -1)).flatten(2))
    if m > 1:
        out[:, width:].addcmul_(grad[:, :width], cross)
