"""The exact chunked dual form: one pass of matrix products per chunk, no per-token weights.

Inside a chunk every gradient is taken at W_c, so each is an outer product a_{l-1}^T delta_l, and W_t is a known
combination of W_c, S_c and those products. A query never needs W_t itself, only its product with it:

    x W_t = keep_t (x W_c) + carry_t (x S_c) - sum_{i <= t} write_ti (x a_i^T) delta_i
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_dist.memory.activations import ACTIVATIONS
from titans_dist.memory.gates import ChunkGates, chunk_gates, read_before
from titans_dist.memory.network import Norm, inner_gradient, output
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

    gates = chunk_gates(chunks(alpha), None if eta is None else chunks(eta), chunks(theta))
    reads = gates if read == "after" else read_before(gates)
    outputs = []
    for n, start in enumerate(range(0, length, size)):
        rows = slice(start, min(start + size, length))
        tokens = rows.stop - rows.start
        inputs, deltas = inner_gradient(spec, state.weights, k[:, :, rows], v[:, :, rows], norm)
        outputs.append(_read(spec, q[:, :, rows], inputs, deltas, norm, state, reads.chunk(n, tokens)))
        state = _write(inputs, deltas, state, gates.chunk(n, tokens))
    return torch.cat(outputs, 2), state


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
        z = gates.keep * (x @ w) - (gates.write * (x @ a.mT)) @ delta
        if gates.carry is not None:
            z = z + gates.carry * (x @ state.momentum[i])
        x = activation(z) if i + 1 < len(inputs) else z
    return output(spec, q, x, norm)


def _write(inputs: list[Tensor], deltas: list[Tensor], state: MemoryState, gates: ChunkGates) -> MemoryState:
    """The memory after a chunk: the gates' last row, applied to the sum of outer products."""

    def written(rows: Tensor) -> list[Tensor]:
        share = rows[..., -1:, :].mT
        return [(a * share).mT @ delta for a, delta in zip(inputs, deltas, strict=True)]

    keep = gates.keep[..., -1:, :]
    weights = [keep * w - u for w, u in zip(state.weights, written(gates.write), strict=True)]
    if gates.carry is None or gates.fade is None or gates.surprise is None:
        return MemoryState(weights, [])
    carry, fade = gates.carry[..., -1:, :], gates.fade[..., -1:, :]
    weights = [w + carry * s for w, s in zip(weights, state.momentum, strict=True)]
    momentum = [fade * s - u for s, u in zip(state.momentum, written(gates.surprise), strict=True)]
    return MemoryState(weights, momentum)
