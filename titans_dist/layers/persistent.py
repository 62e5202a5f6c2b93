"""Persistent memory, and what else belongs to no head: every process uses it whole for its own heads."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from titans_dist.config import ModelConfig
from titans_dist.layers.parameter import Init, normal, parameter


class Shared(nn.Module):
    """A parameter alone in a module, whose output it is: there its gradient is summed over processes."""

    plan: ClassVar = {"weight": "shared"}

    def __init__(self, *shape: int, init: Init, decay: bool) -> None:
        super().__init__()
        self.weight = parameter(*shape, init=init, decay=decay)

    def forward(self) -> Tensor:
        return self.weight


class PersistentMemory(nn.Module):
    """Learned tokens that stand before every sequence (Titans, eq 26): () -> (1, P, hidden)."""

    plan: ClassVar = {"tokens": "shared"}

    def __init__(self, tokens: int, hidden_size: int) -> None:
        super().__init__()
        # As large as the normalized tokens they stand beside.
        self.tokens = parameter(tokens, hidden_size, init=normal(1.0))

    def forward(self) -> Tensor:
        return self.tokens.unsqueeze(0)


def persistent_memory(config: ModelConfig) -> PersistentMemory | None:
    """The persistent tokens of one layer, if it has any."""
    return PersistentMemory(config.persistent_tokens, config.hidden_size) if config.persistent_tokens else None
