"""What the two forms of the operator are given for some tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Tokens:
    """q, k, v (B, T, H, D), gates (B, T, H) or (B, T, H, D), delta (B, T, H), starts (B, T): see `neural_memory`."""

    q: Tensor
    k: Tensor
    v: Tensor
    alpha: Tensor | None
    eta: Tensor | None
    theta: Tensor
    delta: Tensor | None
    starts: Tensor | None

    def part(self, begin: int, end: int) -> Tokens:
        """The tokens from `begin` up to `end`."""
        return Tokens(*(None if x is None else x[:, begin:end] for x in vars(self).values()))  # type: ignore[arg-type]
