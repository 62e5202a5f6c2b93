"""Memory as a layer (Titans, eqs 29-31)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from titans_dist.config import ModelConfig
from titans_dist.layers.attention import Attention
from titans_dist.layers.mag import BesideState
from titans_dist.layers.neural_memory import NeuralMemory
from titans_dist.layers.norm import RMSNorm
from titans_dist.layers.parameter import linear
from titans_dist.layers.persistent import persistent_memory
from titans_dist.layers.state import expand


class MemoryAsLayer(nn.Module):
    """(B, T, hidden) -> the same shape: the sliding-window attention over what the memory makes of [persistent, x].

    The attention's prefix is the memory's output at the persistent tokens.
    """

    plan: ClassVar = {"memory_out": "row", "attention_norm": "norm", "out": "row"}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.persistent = persistent_memory(config)
        self.memory = NeuralMemory(config)
        self.memory_out = linear(hidden, hidden, config.init_std)
        self.attention_norm = RMSNorm(hidden, config.norm_eps)
        self.attention = Attention(config, config.window)
        self.out = linear(hidden, hidden, config.residual_std)

    def forward(
        self, x: Tensor, state: BesideState | None = None, starts: Tensor | None = None
    ) -> tuple[Tensor, BesideState | None]:
        """See `mixers`."""
        prefix, begin = self.memory.begin(None if self.persistent is None else self.persistent())
        m, after = self.memory.write(x, begin if state is None else state.memory, begin, starts)
        cache = None if state is None else state.attention
        y, cache = self.attention(self._between(m), None if prefix is None else self._between(prefix), cache, starts)
        return self.out(y.flatten(2)), None if cache is None else BesideState(after, cache)

    def initial_state(self, batch: int) -> BesideState:
        """The state before the first token."""
        _, begin = self.memory.begin(None if self.persistent is None else self.persistent())
        return BesideState(expand(begin, batch), self.attention.initial_cache(batch))

    def _between(self, m: Tensor) -> Tensor:
        """The memory's output (B, T, H, D) as the attention's input (B, T, hidden)."""
        return self.attention_norm(self.memory_out(m.flatten(2)))
