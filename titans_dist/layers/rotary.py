"""Rotary positions."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(x: Tensor, theta: float, position: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + D/2}) of `x` (B, T, H, D) by angles that grow with the position (B or 1, T).

    The angles are computed in float64: at position 1,000,000 float32 is off by 0.03.
    """
    dim = x.shape[-1]
    frequency = theta ** (-torch.arange(0, dim, 2, device=x.device, dtype=torch.float64) / dim)
    angle = position[..., None, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def positions(length: int, before: Tensor, starts: Tensor | None) -> Tensor:
    """Each token's place in its document, (B or 1, T), counted from 0.

    before (B or 1,): tokens of the running document that have gone before; starts (B, T): tokens that begin another.
    """
    index = torch.arange(length, device=before.device)
    carried = before[:, None] + index
    if starts is None:
        return carried
    began = torch.where(starts, index, -1).cummax(1).values
    return torch.where(began < 0, carried, index - began)
