"""Straight-line pieces of the layers' definitions: one sequence, one head, one token at a time, no library code.

The memory here is a matrix without residual, plain gradient descent with forgetting:
W <- (1 - alpha) W - theta dl/dW (W_c), l = ||k W - v||^2, W_c the memory its chunk of tokens started with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean() + eps).sqrt() * weight


def turned(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotary positions, pair by pair."""
    half, out = x.shape[0] // 2, x.clone()
    for i in range(half):
        angle = position * theta ** (-2 * i / x.shape[0])
        a, b, cos, sin = x[i], x[i + half], math.cos(angle), math.sin(angle)
        out[i], out[i + half] = a * cos - b * sin, b * cos + a * sin
    return out


def attended(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    scores = torch.stack([q @ k for k in keys]) / math.sqrt(q.shape[0])
    return sum(p * v for p, v in zip(scores.softmax(0), values, strict=True))  # type: ignore[return-value]


def convolved(rows: list[Tensor], weight: Tensor) -> Tensor:
    """The last of `rows`, mixed with the kernel - 1 before it (zeros where there are none); then SiLU."""
    kernel = weight.shape[1]
    total = torch.zeros_like(rows[-1])
    for back in range(min(kernel, len(rows))):
        total = total + weight[:, kernel - 1 - back] * rows[-1 - back]
    return F.silu(total)


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


@dataclass
class Matrix:
    """The memory of one head in the middle of a chunk."""

    w: Tensor
    anchor: Tensor
    count: int = 0

    def write(self, k: Tensor, v: Tensor, alpha: Tensor, theta: Tensor, chunk: int) -> None:
        if self.count % chunk == 0:
            self.anchor = self.w
        gradient = 2 * torch.outer(k, k @ self.anchor - v)
        self.w = (1 - alpha) * self.w - theta * gradient
        self.count += 1
