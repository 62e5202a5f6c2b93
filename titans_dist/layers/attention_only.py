"""Attention without a memory: the control (a window) and the Transformer (full)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from titans_dist.config import ModelConfig
from titans_dist.layers.attention import Attention, KeyValueCache
from titans_dist.layers.parameter import linear
from titans_dist.layers.persistent import persistent_memory


class AttentionOnly(nn.Module):
    """(B, T, hidden) -> the same shape: attention over [persistent, x], then the output projection."""

    plan: ClassVar = {"out": "row"}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.persistent = persistent_memory(config)
        self.attention = Attention(config, config.window if config.variant == "swa" else None)
        self.out = linear(config.hidden_size, config.hidden_size, config.residual_std)

    def forward(
        self, x: Tensor, state: KeyValueCache | None = None, starts: Tensor | None = None
    ) -> tuple[Tensor, KeyValueCache | None]:
        """See `mixers`."""
        persistent = None if self.persistent is None else self.persistent()
        y, cache = self.attention(x, persistent, state, starts)
        return self.out(y.flatten(2)), cache

    def initial_state(self, batch: int) -> KeyValueCache:
        """The state before the first token."""
        return self.attention.initial_cache(batch)
