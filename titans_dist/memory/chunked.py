"""The exact chunked dual form: one pass of matrix products per chunk, no per-token weights.

Inside a chunk every gradient is taken at W_c, so each is an outer product -a_{l-1}^T delta_l with delta = -dl/dz, and
W_t is a known combination of W_c, S_c and those products. A query never needs W_t itself, only its product with it:

    x W_t = keep_t (x W_c) + carry_t (x S_c) + sum_{i <= t} write_ti (x a_i^T) delta_i
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

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
    length = q.shape[2]
    size = min(chunk_size, length)

    def chunks(gate: Tensor) -> Tensor:  # padding at the end never reaches an earlier token
        return F.pad(gate, (0, -length % size)).unflatten(-1, (-1, size))

    batch, heads = q.shape[:2]
    lengths = [min(size, length - start) for start in range(0, length, size)]
    gates = chunk_gates(chunks(alpha), None if eta is None else chunks(eta), chunks(theta))
    writes = gates.split(lengths)
    reads = writes if read == "after" else read_before(gates).split(lengths)
    if norm is not None:
        norm = (_rows(norm[0], batch, heads), _rows(norm[1], batch, heads))
    state = MemoryState([w.flatten(0, 1) for w in state.weights], [s.flatten(0, 1) for s in state.momentum])
    outputs = []
    parts = (x.flatten(0, 1).split(size, 1) for x in (q, k, v))
    for q_c, k_c, v_c, gates_r, gates_w in zip(*parts, reads, writes, strict=True):
        inputs, deltas = descent(spec, state.weights, k_c, v_c, norm)
        outputs.append(_read(spec, q_c, inputs, deltas, norm, state, gates_r))
        state = _write(inputs, deltas, state, gates_w)

    def unflatten(xs: list[Tensor]) -> list[Tensor]:
        return [x.unflatten(0, (batch, heads)) for x in xs]

    return unflatten([torch.cat(outputs, 1)])[0], MemoryState(unflatten(state.weights), unflatten(state.momentum))


# From here on batch and heads are one dimension: every product is one bmm over (B H, tokens, features).


def _read(
    spec: MemorySpec,
    q: Tensor,
    inputs: list[Tensor],
    deltas: list[Tensor],
    norm: Norm | None,
    state: MemoryState,
    gates: ChunkGates,
) -> Tensor:
    """f(W_t; q_t) for every token of a chunk, layer by layer."""
    activation, _ = ACTIVATIONS[spec.activation]
    x = q
    for i, (w, a, delta) in enumerate(zip(state.weights, inputs, deltas, strict=True)):
        z = _weighted(gates.keep, x, w)
        if gates.carry is not None:
            z = z + _weighted(gates.carry, x, state.momentum[i])
        z = torch.baddbmm(z, gates.write * (x @ a.mT), delta)
        x = activation(z) if i + 1 < len(inputs) else z
    return output(spec, q, x, norm)


def _write(inputs: list[Tensor], deltas: list[Tensor], state: MemoryState, gates: ChunkGates) -> MemoryState:
    """The memory after a chunk: the gates' last row, applied to the sum of outer products."""

    def plus_written(old: list[Tensor], rows: Tensor) -> list[Tensor]:
        share = rows[:, -1:].mT
        products = [_outer(share, a, delta) for a, delta in zip(inputs, deltas, strict=True)]
        return [torch.baddbmm(s, a, delta) for s, (a, delta) in zip(old, products, strict=True)]

    kept = [gates.keep[:, -1:] * w for w in state.weights]
    if gates.carry is None or gates.fade is None or gates.surprise is None:
        return MemoryState(plus_written(kept, gates.write), [])
    carry, fade = gates.carry[:, -1:], gates.fade[:, -1:]
    kept = [torch.addcmul(w, carry, s) for w, s in zip(kept, state.momentum, strict=True)]
    faded = [fade * s for s in state.momentum]
    return MemoryState(plus_written(kept, gates.write), plus_written(faded, gates.surprise))


def _weighted(gate: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """gate * (x @ w), the gate (.., tokens, 1) taken on the narrower side."""
    return (gate * x) @ w if w.shape[-2] <= w.shape[-1] else gate * (x @ w)


def _outer(share: Tensor, a: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of sum_i share_i a_i^T delta_i, the share taken on the narrower side."""
    return ((a * share).mT, delta) if a.shape[-1] <= delta.shape[-1] else (a.mT, delta * share)


def _rows(x: Tensor, batch: int, heads: int) -> Tensor:
    """LayerNorm's (D,) or (H, 1, D) for every sequence and head, (B H, 1, D)."""
    return x.expand(batch, heads, 1, x.shape[-1]).flatten(0, 1)
