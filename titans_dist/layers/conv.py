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

    def forward(self, x: Tensor, past: Tensor | None = None) -> Tensor:
        """`past` (B or 1, P, C) are the tokens before `x`; without it, zeros."""
        channels, kernel = self.weight.shape
        if past is not None:
            past = past[:, max(0, past.shape[1] - kernel + 1) :]
            x = torch.cat([past.expand(x.shape[0], -1, -1), x], 1)
        before = 0 if past is None else past.shape[1]
        y = F.conv1d(F.pad(x.mT, (kernel - 1, 0)), self.weight.unsqueeze(1), groups=channels)
        return y[..., before:].mT
