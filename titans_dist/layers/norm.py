"""RMSNorm over the residual stream, and over each head by itself."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from titans_dist.layers.parameter import constant, parameter


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, (..., hidden) -> the same shape."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = parameter(hidden_size, init=constant(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class HeadNorm(nn.Module):
    """RMSNorm of every head by itself with a learned weight per head, (B, T, H, D) -> the same shape."""

    plan: ClassVar = {"weight": "heads"}
    full_width: ClassVar = {"weight": "whole"}

    def __init__(self, num_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = parameter(num_heads, head_dim, init=constant(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return head_norm(x, self.weight, self.eps)


def head_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dimension of (B, T, H, D), times weight (H, D)."""
    return F.rms_norm(x, x.shape[-1:], eps=eps) * weight
