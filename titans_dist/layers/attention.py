"""Sliding-window attention with rotary positions and a persistent prefix."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans_dist.config import ModelConfig
from titans_dist.layers.parameter import linear


def rotary(x: Tensor, theta: float) -> Tensor:
    """Rotate the pairs (x_i, x_{i + D/2}) of `x` (B, T, H, D) by angles that grow with the position."""
    length, dim = x.shape[1], x.shape[-1]
    frequency = theta ** (-torch.arange(0, dim, 2, device=x.device, dtype=torch.float32) / dim)
    angle = torch.arange(length, device=x.device, dtype=torch.float32)[:, None, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, prefix: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Attention of each token to itself, the `window - 1` tokens before it and the whole prefix.

    q, k, v: (B, T, H, D); prefix: keys and values (1, P, H, D). Returns (B, T, H, D). The sequence is cut into
    blocks of `window` tokens that look at themselves and one block back: time and memory O(T window).
    """
    batch, length = q.shape[:2]
    window = min(window, length)
    blocks = -(-length // window)

    def cut(x: Tensor) -> Tensor:  # (B, N, H, window, D)
        x = F.pad(x, (0, 0, 0, 0, 0, blocks * window - length))
        return x.unflatten(1, (blocks, window)).transpose(2, 3)

    def with_previous(x: Tensor) -> Tensor:  # (B, N, H, 2 window, D)
        return torch.cat([torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1), x], 3)

    row = torch.arange(window, device=q.device)[:, None]
    column = torch.arange(2 * window, device=q.device)[None]
    visible = ((column > row) & (column <= row + window)).repeat(blocks, 1, 1)
    visible[0, :, :window] = False  # there is no block before the first
    keys, values = with_previous(cut(k)), with_previous(cut(v))
    if prefix is not None:
        parts = [x.transpose(1, 2).unsqueeze(1).expand(batch, blocks, -1, -1, -1) for x in prefix]
        keys, values = torch.cat([parts[0], keys], 3), torch.cat([parts[1], values], 3)
        visible = F.pad(visible, (parts[0].shape[3], 0), value=True)
    out = F.scaled_dot_product_attention(
        cut(q).flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1), visible.unsqueeze(1).repeat(batch, 1, 1, 1)
    )
    return out.unflatten(0, (batch, blocks)).transpose(2, 3).flatten(1, 2)[:, :length]


class SlidingWindowAttention(nn.Module):
    """Multi-head attention over a window: (B, T, hidden) -> (B, T, H, D), before any output projection."""

    plan: ClassVar = {"q": "column", "k": "column", "v": "column"}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.head_dim, self.window, self.theta = config.head_dim, config.window, config.rope_theta
        self.q = linear(hidden, hidden, config.init_std)
        self.k = linear(hidden, hidden, config.init_std)
        self.v = linear(hidden, hidden, config.init_std)

    def forward(self, x: Tensor, persistent: Tensor | None) -> Tensor:
        """`persistent` (1, P, hidden) is seen by every token; it has no position."""
        q, k, v = self._heads(self.q(x)), self._heads(self.k(x)), self._heads(self.v(x))
        prefix = None if persistent is None else (self._heads(self.k(persistent)), self._heads(self.v(persistent)))
        return window_attention(rotary(q, self.theta), rotary(k, self.theta), v, self.window, prefix)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))
