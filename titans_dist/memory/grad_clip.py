"""A limit on the gradient that goes back from chunk to chunk through a memory's state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class StateGradClip:
    """Keeps the gradient at a state between two groups of chunks within `limit` times that at the sequence's outputs.

    Both are norms of one row (one head of one sequence), over all that the state holds and over all outputs: neither
    the scale of the loss nor the other rows of the batch matter. Where a sequence is written in several calls, one
    clip is shared by all of them: a call whose own outputs nobody reads still hands on what later outputs ask for.
    """

    def __init__(self, limit: float, is_shared: bool = False) -> None:
        self.limit, self.is_shared = limit, is_shared
        self.largest: Tensor | None = None  # (B H,); known once the gradient at the results is, which comes first

    def results(self, y: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """The outputs (B, T, H, D) of the whole sequence and the states (B, H, d_in, d_out) after it, as they are."""
        return _Noticed.apply(self, y, *state)

    def slots(self, layers: list[list[Tensor]]) -> list[list[Tensor]]:
        """Per layer the slots (B H, d_in, d_out) between two groups, as they are."""
        m = len(layers[0])
        flat = _Clipped.apply(self, *(x for layer in layers for x in layer))
        return [list(flat[i : i + m]) for i in range(0, len(flat), m)]


class _Noticed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, clip: StateGradClip, *results: Tensor) -> tuple[Tensor, ...]:
        ctx.clip = clip
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        rows = [None if g is None else g.transpose(1, 2) if i == 0 else g for i, g in enumerate(grads)]
        norms = [torch.linalg.vector_norm(g.double(), dim=(2, 3)).flatten() for g in rows if g is not None]
        ctx.clip.largest = ctx.clip.limit * torch.linalg.vector_norm(torch.stack(norms), dim=0)
        return (None, *grads)


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, clip: StateGradClip, *slots: Tensor) -> tuple[Tensor, ...]:
        ctx.clip = clip
        return tuple(x.view_as(x) for x in slots)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if ctx.clip.largest is None:  # nothing was asked of the outputs
            return (None, *grads)
        largest = ctx.clip.largest[:, None, None].to(grads[0].dtype)
        # The largest element first: the squares of an exploding gradient are infinite long before it is.
        top = torch.stack([g.abs().amax((1, 2)) for g in grads]).amax(0)[:, None, None]
        safe = top.clamp_min(torch.finfo(top.dtype).tiny)
        norm = safe * torch.stack([(g / safe).square().sum((1, 2), keepdim=True) for g in grads]).sum(0).sqrt()
        return (None, *(torch.where(norm <= largest, g, (g / norm * largest).nan_to_num(0.0)) for g in grads))
