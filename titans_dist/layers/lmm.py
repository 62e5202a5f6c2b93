"""The long-term memory module alone (Titans LMM)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from titans_dist.config import ModelConfig
from titans_dist.layers.neural_memory import LayerState, NeuralMemory
from titans_dist.layers.parameter import linear
from titans_dist.layers.persistent import persistent_memory
from titans_dist.layers.state import expand


class MemoryAlone(nn.Module):
    """(B, T, hidden) -> the same shape: the neural memory over [persistent, x], then the output projection."""

    plan: ClassVar = {"out": "row"}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.persistent = persistent_memory(config)
        self.memory = NeuralMemory(config)
        self.out = linear(config.hidden_size, config.hidden_size, config.residual_std)

    def forward(
        self, x: Tensor, state: LayerState | None = None, starts: Tensor | None = None
    ) -> tuple[Tensor, LayerState | None]:
        """See `mixers`."""
        persistent = None if self.persistent is None else self.persistent()
        y, after = self.memory(x, persistent, state, starts)
        return self.out(y.flatten(2)), None if state is None else after

    def initial_state(self, batch: int) -> LayerState:
        """The state before the first token."""
        persistent = None if self.persistent is None else self.persistent()
        return expand(self.memory.begin(persistent)[1], batch)
