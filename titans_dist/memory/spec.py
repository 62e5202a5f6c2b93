"""What a memory is, apart from its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor


@dataclass(frozen=True)
class MemorySpec:
    """An MLP memory of `depth` layers without biases, trained at test time on ||f(k) - v||^2.

    With `residual` the memory is f(x) = x + LayerNorm(MLP(x)) (MIRAS), otherwise f(x) = MLP(x). With `momentum`
    writes carry the past surprise (Titans, eqs 9-10). `activation` is gelu, silu, relu or identity.
    """

    depth: int = 2
    expansion: int = 4
    activation: str = "gelu"
    residual: bool = True
    momentum: bool = True

    def shapes(self, head_dim: int) -> list[tuple[int, int]]:
        """(d_in, d_out) of each layer for heads of `head_dim` dimensions."""
        hidden = head_dim * self.expansion
        sizes = [head_dim] + [hidden] * (self.depth - 1) + [head_dim]
        return list(pairwise(sizes))

    def initial_std(self, head_dim: int) -> list[float]:
        """Standard deviation of each layer's initial weights.

        With `residual` the last layer of a deep memory starts large. Under the LayerNorm its scale changes no output,
        but divides its inner gradients: a chunk of equal keys then moves the memory by its error, not by many times it.
        """
        stds = [d_in**-0.5 for d_in, _ in self.shapes(head_dim)]
        if not self.residual:
            return stds
        stds[0] = 1.0  # keys have unit length
        return stds if self.depth == 1 else [*stds[:-1], 5 * stds[-1]]


@dataclass
class MemoryState:
    """The memory between two calls: one tensor (B, H, d_in, d_out) per layer, float32 (float64 for float64 inputs).

    `momentum` is the running surprise S; it is empty for a memory without momentum.
    """

    weights: list[Tensor]
    momentum: list[Tensor]
