"""The memory's non-linearities with their derivatives: z -> (act(z), act'(z)).

The inner gradient is written out, not traced, so the derivative is a value like any other, and training differentiates
it once more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class _Gelu(torch.autograd.Function):
    """gelu and gelu', with gelu''(z) = pdf(z) (2 - z^2): a few passes over memory where autograd takes twenty."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        slope = torch.ops.aten.gelu_backward(torch.ones((), dtype=z.dtype, device=z.device).expand_as(z), z)
        ctx.save_for_backward(z, slope)
        return F.gelu(z), slope

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_slope: Tensor) -> Tensor:
        z, slope = ctx.saved_tensors
        square = z * z
        curvature = (square * -0.5).exp_().mul_(2 - square).mul_(1 / math.sqrt(2 * math.pi))
        return (grad * slope).addcmul_(grad_slope, curvature)


def _silu(z: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(z)
    return z * s, s * (1 + z * (1 - s))


# By name: the activation alone, and the activation with its derivative.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
    "gelu": (F.gelu, _Gelu.apply),
    "silu": (F.silu, _silu),
    "relu": (F.relu, lambda z: (F.relu(z), (z > 0).to(z.dtype))),
    "identity": (lambda z: z, lambda z: (z, torch.ones_like(z))),
}
