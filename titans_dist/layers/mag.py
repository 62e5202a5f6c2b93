"""Memory as a gate (Titans, eqs 26-28)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from titans_dist.config import ModelConfig
from titans_dist.layers.attention import SlidingWindowAttention
from titans_dist.layers.neural_memory import NeuralMemory
from titans_dist.layers.norm import HeadNorm
from titans_dist.layers.parameter import linear, normal, parameter


class PersistentMemory(nn.Module):
    """Learned tokens that stand before every sequence (Titans, eq 26): () -> (1, P, hidden)."""

    plan: ClassVar = {"tokens": "shared"}

    def __init__(self, tokens: int, hidden_size: int) -> None:
        super().__init__()
        # As large as the normalized tokens they stand beside.
        self.tokens = parameter(tokens, hidden_size, init=normal(1.0))

    def forward(self) -> Tensor:
        return self.tokens.unsqueeze(0)


class MemoryAsGate(nn.Module):
    """(B, T, hidden) -> the same shape: o = silu(w1 norm(y)) * (w2 norm(m)), then one output projection.

    y is the sliding-window attention over [persistent, x], m the neural memory over the same; the weights w1, w2
    of eq 28 are those of the two per-head norms.
    """

    plan: ClassVar = {"out": "row"}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, heads, dim = config.hidden_size, config.num_heads, config.head_dim
        self.persistent = PersistentMemory(config.persistent_tokens, hidden) if config.persistent_tokens else None
        self.attention = SlidingWindowAttention(config)
        self.memory = NeuralMemory(config)
        self.attention_norm = HeadNorm(heads, dim, config.norm_eps)
        self.memory_norm = HeadNorm(heads, dim, config.norm_eps)
        self.out = linear(hidden, hidden, config.residual_std)

    def forward(self, x: Tensor) -> Tensor:
        persistent = None if self.persistent is None else self.persistent()
        y = self.attention_norm(self.attention(x, persistent))
        m = self.memory_norm(self.memory(x, persistent))
        return self.out((F.silu(y) * m).flatten(2))
