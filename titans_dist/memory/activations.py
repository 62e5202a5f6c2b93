"""The memory's non-linearities with their derivatives.

The inner gradient is written out, not traced, so the first derivative is a value like any other, and training
differentiates it once more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Activation(NamedTuple):
    """act(z); (act(z), act'(z)), differentiable; (g, z) -> g act'(z) and act''(z), not differentiable."""

    value: Callable[[Tensor], Tensor]
    with_slope: Callable[[Tensor], tuple[Tensor, Tensor]]
    pull_back: Callable[[Tensor, Tensor], Tensor]
    curvature: Callable[[Tensor], Tensor]


class _Gelu(torch.autograd.Function):
    """gelu and gelu': a few passes over memory where autograd takes twenty."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        slope = torch.ops.aten.gelu_backward(torch.ones((), dtype=z.dtype, device=z.device).expand_as(z), z)
        ctx.save_for_backward(z, slope)
        return F.gelu(z), slope

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_slope: Tensor) -> Tensor:
        z, slope = ctx.saved_tensors
        return (grad * slope).addcmul_(grad_slope, _gelu_curvature(z))


def _gelu_curvature(z: Tensor) -> Tensor:
    square = z * z
    return (square * -0.5).exp_().mul_(2 - square).mul_(1 / math.sqrt(2 * math.pi))


def _silu(z: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(z)
    return z * s, s * (1 + z * (1 - s))


def _silu_curvature(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 - s) * (2 + z * (1 - 2 * s))


def _relu_slope(z: Tensor) -> Tensor:
    return (z > 0).to(z.dtype)


ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation(F.gelu, _Gelu.apply, torch.ops.aten.gelu_backward, _gelu_curvature),
    "silu": Activation(F.silu, _silu, torch.ops.aten.silu_backward, _silu_curvature),
    "relu": Activation(
        F.relu, lambda z: (F.relu(z), _relu_slope(z)), lambda g, z: g * _relu_slope(z), torch.zeros_like
    ),
    "identity": Activation(lambda z: z, lambda z: (z, torch.ones_like(z)), lambda g, z: g.clone(), torch.zeros_like),
}
