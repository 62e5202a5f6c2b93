"""Causal depthwise convolution over time."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans_dist.layers.parameter import parameter, uniform


class CausalConv(nn.Module):
    """Mixes each channel over its last `kernel` tokens: (B, T, C) -> the same shape."""

    plan: ClassVar = {"weight": "heads"}

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.weight = parameter(channels, kernel, init=uniform(kernel**-0.5))

    def forward(
        self, x: Tensor, past: Tensor, starts: Tensor | None = None, begin: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`past` (B or 1, kernel - 1, C): the tokens before `x`. Returns also those before the next token.

        starts (B, T): tokens that begin a document; before it lies `begin` (1, kernel - 1, C) instead of other tokens.
        """
        channels, kernel = self.weight.shape
        whole = torch.cat([past.expand(x.shape[0], -1, -1), x], 1)
        length, reach = x.shape[1], kernel - 1
        if starts is None:
            y = F.conv1d(whole.mT, self.weight.unsqueeze(1), groups=channels).mT
            return y, whole[:, length:]
        assert begin is not None
        since = _tokens_since_start(starts, reach)

        def back(steps: int, first: int, last: int) -> Tensor:
            """What tokens `first` up to `last` have `steps` tokens before them."""
            age = since[:, first:last]
            other = begin[0][(reach + age - steps).clamp(0, max(reach - 1, 0))] if steps else None
            own = whole[:, reach + first - steps : reach + last - steps]
            return own if other is None else torch.where((age < steps).unsqueeze(-1), other, own)

        y = sum((back(j, 0, length) * self.weight[:, reach - j] for j in range(1, kernel)), x * self.weight[:, reach])
        return y, torch.cat([back(j, length, length + 1) for j in range(reach, 0, -1)] or [whole[:, length:]], 1)

    def no_past(self) -> Tensor:
        """Zeros (1, kernel - 1, C), as the past of the very first token."""
        channels, kernel = self.weight.shape
        return self.weight.new_zeros(1, kernel - 1, channels)


def _tokens_since_start(starts: Tensor, most: int) -> Tensor:
    """(B, T + 1): how many tokens ago each token's document began, the next token's last; never more than `most`.

    A document that began before these tokens counts as `most`: its past already is what it may see.
    """
    index = torch.arange(starts.shape[1], device=starts.device)
    began = torch.where(starts, index, -most).cummax(1).values
    began = torch.cat([began, began[:, -1:]], 1)
    return (torch.arange(starts.shape[1] + 1, device=starts.device) - began).clamp_max(most)
