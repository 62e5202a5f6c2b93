"""The memory operator: checks, layout and precision around the chunked form."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_dist.memory.chunked import dual_form
from titans_dist.memory.network import Norm
from titans_dist.memory.spec import MemorySpec, MemoryState


def initial_state(spec: MemorySpec, weights: list[Tensor], batch: int) -> MemoryState:
    """The state before the first token: W_0 (H, d_in, d_out) for each of `batch` sequences, and S_0 = 0."""
    accumulate = torch.promote_types(weights[0].dtype, torch.float32)
    start = [w.to(accumulate).expand(batch, *w.shape) for w in weights]
    return MemoryState(start, [torch.zeros_like(w) for w in start] if spec.momentum else [])


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    spec: MemorySpec,
    weights: list[Tensor],
    alpha: Tensor,
    eta: Tensor | None,
    theta: Tensor,
    norm: Norm | None = None,
    state: MemoryState | None = None,
    chunk_size: int,
    read: str = "after",
) -> tuple[Tensor, MemoryState]:
    """Write every (k, v) into a memory that learns at test time, and read it with q (Titans, eqs 12-18).

    q, k, v: (B, T, H, D). alpha (share forgotten), eta (momentum kept), theta (inner learning rate): (B, T, H);
    eta is not used without momentum and may then be None.
    weights: the learned memory W_0, one (H, d_in, d_out) per layer; used where `state` is None.
    norm: gain and bias, (H, D) or (D,), of the memory's LayerNorm; needed where `spec.residual`.
    chunk_size: tokens whose inner gradients are taken at the same memory; 1 is the online recurrence.
    read: "after" (a token sees its own write) or "before".
    Returns y (B, T, H, D) in q's dtype, and the state after the last token in float32 (float64 for float64
    inputs). A state may be carried into another call where that call starts at a chunk border.
    Differentiable in every input. Raises ValueError for shapes or values that do not fit.
    """
    _check(q, k, v, spec, weights, alpha, eta, theta, norm, chunk_size, read)
    accumulate = torch.promote_types(q.dtype, torch.float32)

    def heads_first(x: Tensor) -> Tensor:
        return x.to(accumulate).transpose(1, 2)

    if norm is not None:  # (H, 1, D) or (D,) broadcasts over (B, H, T, D)
        norm = (_per_head(norm[0].to(accumulate)), _per_head(norm[1].to(accumulate)))
    y, state = dual_form(
        spec,
        heads_first(q),
        heads_first(k),
        heads_first(v),
        heads_first(alpha),
        heads_first(eta) if eta is not None and spec.momentum else None,
        heads_first(theta),
        norm,
        initial_state(spec, weights, q.shape[0]) if state is None else state,
        chunk_size,
        read,
    )
    return y.transpose(1, 2).to(q.dtype), state


def _per_head(x: Tensor) -> Tensor:
    return x.unsqueeze(-2) if x.dim() == 2 else x


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: MemorySpec,
    weights: list[Tensor],
    alpha: Tensor,
    eta: Tensor | None,
    theta: Tensor,
    norm: Norm | None,
    chunk_size: int,
    read: str,
) -> None:
    if q.dim() != 4 or q.shape[1] < 1:
        raise ValueError(f"q has shape {tuple(q.shape)}; it must be (B, T, H, D) with T >= 1")
    batch, length, heads, dim = q.shape
    for name, x, shape in (
        ("k", k, (batch, length, heads, dim)),
        ("v", v, (batch, length, heads, dim)),
        ("alpha", alpha, (batch, length, heads)),
        ("eta", eta, (batch, length, heads)),
        ("theta", theta, (batch, length, heads)),
    ):
        if x is None:
            if spec.momentum:
                raise ValueError("eta is missing; a memory with momentum=True needs the gate (B, T, H)")
            continue
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; q of shape {tuple(q.shape)} asks for {shape}")
    expected = [(heads, *shape) for shape in spec.shapes(dim)]
    if [tuple(w.shape) for w in weights] != expected:
        raise ValueError(f"weights have shapes {[tuple(w.shape) for w in weights]}; the spec asks for {expected}")
    if spec.residual and norm is None:
        raise ValueError("norm is missing; a memory with residual=True needs the pair (gain, bias)")
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} is too small; use 1 or more")
    if read not in ("after", "before"):
        raise ValueError(f"read={read!r} is unknown; use 'after' or 'before'")
