"""The exact chunked dual form: one pass of matrix products per chunk, no per-token weights.

Inside a chunk every gradient is taken at W_c, so each is an outer product -a_{l-1}^T delta_l with delta = -dl/dz, and
W_t is a known combination of W_c, S_c and those products. A query never needs W_t itself, only its product with it:

    x W_t = past_t0 (x W_c) + past_t1 (x S_c) + sum_{i <= t} write_ti (x a_i^T) delta_i

Batch and heads are one dimension here, G = B H, and the slots W and S of a layer one tensor (G, m, d_in, d_out).
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_dist.memory.activations import ACTIVATIONS
from titans_dist.memory.gates import ChunkGates, chunk_gates, read_before
from titans_dist.memory.network import Norm, descent, output
from titans_dist.memory.spec import MemorySpec, MemoryState


def dual_form(
    spec: MemorySpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor | None,
    theta: Tensor,
    norm: Norm | None,
    state: MemoryState,
    chunk_size: int,
    read: str,
) -> tuple[Tensor, MemoryState]:
    """q, k, v (B, H, T, D), gates (B, H, T) -> y (B, H, T, D) and the state after token T. Time O(T chunk_size)."""
    batch, heads, length = q.shape[:3]
    slots = [
        torch.stack(ws, 2).flatten(0, 1) for ws in zip(*filter(None, (state.weights, state.momentum)), strict=True)
    ]
    if norm is not None:
        norm = (_every_row(norm[0], batch, heads), _every_row(norm[1], batch, heads))
    whole = length - length % chunk_size
    outputs = []
    for rows, size in ((slice(0, whole), chunk_size), (slice(whole, length), length - whole)):  # the last may be short
        if rows.start == rows.stop:
            continue
        alphas, etas, thetas = (
            None if gate is None else gate[:, :, rows].unflatten(-1, (-1, size)) for gate in (alpha, eta, theta)
        )
        assert alphas is not None and thetas is not None
        gates = chunk_gates(alphas, etas, thetas)
        if read == "before":
            gates = read_before(gates)
        parts = [x[:, :, rows].flatten(0, 1).split(size, 1) for x in (q, k, v)]
        for q_c, k_c, v_c, gates_c in zip(*parts, gates.split(), strict=True):
            inputs, deltas = descent(spec, [x[:, 0] for x in slots], k_c, v_c, norm)
            outputs.append(_read(spec, q_c, inputs, deltas, norm, slots, gates_c))
            slots = [_write(x, a, d, gates_c) for x, a, d in zip(slots, inputs, deltas, strict=True)]
    ends = [x.unflatten(0, (batch, heads)).unbind(2) for x in slots]
    y = torch.cat(outputs, 1).unflatten(0, (batch, heads))
    return y, MemoryState([x[0] for x in ends], [x[1] for x in ends if len(x) > 1])


def _read(
    spec: MemorySpec,
    q: Tensor,
    inputs: list[Tensor],
    deltas: list[Tensor],
    norm: Norm | None,
    slots: list[Tensor],
    gates: ChunkGates,
) -> Tensor:
    """f(W_t; q_t) for every token of a chunk (G, b, D), layer by layer."""
    activation, _ = ACTIVATIONS[spec.activation]
    x = q
    for i, (past, a, delta) in enumerate(zip(slots, inputs, deltas, strict=True)):
        z = torch.baddbmm(_past(x, past, gates.past), gates.write * (x @ a.mT), delta)
        x = activation(z) if i + 1 < len(inputs) else z
    return output(spec, q, x, norm)


def _past(x: Tensor, slots: Tensor, gate: Tensor) -> Tensor:
    """sum_m gate_m (x @ slots_m): (G, b, d_in), gate (G, b, m) -> (G, b, d_out); the gate on the narrower side."""
    if slots.shape[2] <= slots.shape[3]:
        return _scaled(x, gate) @ slots.flatten(1, 2)
    return (gate.mT.unsqueeze(-1) * (x.unsqueeze(1) @ slots)).sum(1)


def _write(slots: Tensor, a: Tensor, delta: Tensor, gates: ChunkGates) -> Tensor:
    """One layer's slots after a chunk: the old ones mixed, and the sum of outer products."""
    kept = (gates.keep @ slots.flatten(2)).view_as(slots)
    if slots.shape[2] <= slots.shape[3]:
        return torch.baddbmm(kept.flatten(1, 2), _scaled(a, gates.add.mT).mT, delta).view_as(slots)
    return kept + a.mT.unsqueeze(1) @ (gates.add.unsqueeze(-1) * delta.unsqueeze(1))


def _scaled(x: Tensor, gate: Tensor) -> Tensor:
    """x (G, b, d) once per slot, each times its gate (G, b, m), side by side: (G, b, m d)."""
    return (gate.unsqueeze(-1) * x.unsqueeze(2)).flatten(2)


def _every_row(x: Tensor, batch: int, heads: int) -> Tensor:
    """LayerNorm's (D,) or (H, 1, D) for every sequence and head, (G, 1, D)."""
    return x.expand(batch, heads, 1, x.shape[-1]).flatten(0, 1)
