"""Small models: one that has every property, and some that each lack exactly one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 8


class Sound(nn.Module):
    """An exponential moving average of embeddings, then a layer; its state is the average."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(32, WIDTH)
        self.layer = nn.Linear(WIDTH, 5)

    def initial_state(self, batch: int) -> Tensor:
        return self.layer.weight.new_zeros(batch, WIDTH)

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> Any:
        x = self.mixed(self.embedding(tokens))
        average, found = self.begin(tokens, state), []
        for t in range(x.shape[1]):
            average = 0.9 * average + x[:, t]
            found.append(average)
        y = self.layer(torch.tanh(torch.stack(found, 1)))
        return y if state is None else (y, average)

    def begin(self, tokens: Tensor, state: Tensor | None) -> Tensor:
        return self.initial_state(tokens.shape[0]) if state is None else state

    def mixed(self, x: Tensor) -> Tensor:
        return x


class SeesTheNextToken(Sound):
    """Its leak is small, and of one token only; carried over the border of a call it would be a second fault."""

    initial_state = None  # type: ignore[assignment]

    def begin(self, tokens: Tensor, state: Tensor | None) -> Tensor:
        return self.layer.weight.new_zeros(tokens.shape[0], WIDTH)

    def mixed(self, x: Tensor) -> Tensor:
        return x + 1e-9 * F.pad(x[:, 1:], (0, 0, 0, 1))


class MixesTheBatch(Sound):
    """Normalizes over the batch, as BatchNorm does."""

    def mixed(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class CountsTheBatch(Sound):
    """Depends on how many sequences there are, whatever is in them."""

    def mixed(self, x: Tensor) -> Tensor:
        return x / x.shape[0]


class HasDeadParameter(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3))
        self.silenced = nn.Parameter(torch.ones(WIDTH))

    def mixed(self, x: Tensor) -> Tensor:
        return x + 0 * self.silenced


class ForgetsItsState(Sound):
    """Takes a state, and begins anew all the same."""

    def begin(self, tokens: Tensor, state: Tensor | None) -> Tensor:
        return self.initial_state(tokens.shape[0])


class ForgetsTheHalf(Sound):
    """Right when all tokens come at once, wrong at every cut: what it hands on is not what it had."""

    def begin(self, tokens: Tensor, state: Tensor | None) -> Tensor:
        return super().begin(tokens, state) / 2


class OnlyFloat32(Sound):
    """Cannot be cast to float64; leaks nothing."""

    def mixed(self, x: Tensor) -> Tensor:
        return x @ torch.eye(WIDTH)
