"""Memory as a gate (Titans, eqs 26-28)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from titans_dist.config import ModelConfig
from titans_dist.layers.attention import Attention, KeyValueCache
from titans_dist.layers.neural_memory import LayerState, NeuralMemory
from titans_dist.layers.norm import HeadNorm
from titans_dist.layers.parameter import linear
from titans_dist.layers.persistent import persistent_memory
from titans_dist.layers.state import expand


@dataclass
class BesideState:
    """A memory and an attention that run side by side, or one after the other."""

    memory: LayerState
    attention: KeyValueCache


class MemoryAsGate(nn.Module):
    """(B, T, hidden) -> the same shape: o = silu(w1 norm(y)) * (w2 norm(m)), then one output projection.

    y is the sliding-window attention over [persistent, x], m the neural memory over the same; the weights w1, w2
    of eq 28 are those of the two per-head norms.
    """

    plan: ClassVar = {"out": "row"}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, heads, dim = config.hidden_size, config.num_heads, config.head_dim
        self.persistent = persistent_memory(config)
        self.attention = Attention(config, config.window)
        self.memory = NeuralMemory(config)
        self.attention_norm = HeadNorm(heads, dim, config.norm_eps)
        self.memory_norm = HeadNorm(heads, dim, config.norm_eps)
        self.out = linear(hidden, hidden, config.residual_std)

    def forward(
        self, x: Tensor, state: BesideState | None = None, starts: Tensor | None = None
    ) -> tuple[Tensor, BesideState | None]:
        """See `mixers`."""
        persistent = None if self.persistent is None else self.persistent()
        y, cache = self.attention(x, persistent, None if state is None else state.attention, starts)
        m, after = self.memory(x, persistent, None if state is None else state.memory, starts)
        o = F.silu(self.attention_norm(y)) * self.memory_norm(m)
        return self.out(o.flatten(2)), None if state is None else BesideState(after, cache)

    def initial_state(self, batch: int) -> BesideState:
        """The state before the first token."""
        persistent = None if self.persistent is None else self.persistent()
        return BesideState(expand(self.memory.begin(persistent)[1], batch), self.attention.initial_cache(batch))
