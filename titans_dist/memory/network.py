"""The memory as a network: its output, and the gradient of its inner loss written out by hand.

Each layer's gradient is an outer product -a_{l-1}^T delta_l with delta_l = -dl/dz_l, so the pair (inputs, deltas) says
all of it. The sign is that of a write: what the memory adds, not what it would subtract.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_dist.memory.activations import ACTIVATIONS
from titans_dist.memory.bias import output_descent
from titans_dist.memory.spec import MemorySpec

NORM_EPS = 1e-6
Norm = tuple[Tensor, Tensor]
WithSlope = Callable[[Tensor], tuple[Tensor, Tensor]]


def layer_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` (..., D) with zero mean and unit variance, and the reciprocal standard deviation (..., 1)."""
    # Some links make huge memories out of small accumulators: what is squared must not leave float32.
    scale = x.detach().abs().amax(-1, keepdim=True).clamp_min(1.0)
    small = x / scale
    centered = small - small.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centered.square().mean(-1, keepdim=True) + NORM_EPS / scale / scale)
    return centered * rstd, rstd / scale


def output(spec: MemorySpec, x: Tensor, raw: Tensor, norm: Norm | None) -> Tensor:
    """f(x) from the input and the MLP's output, both (..., D)."""
    if not spec.residual:
        return raw
    assert norm is not None
    gain, bias = norm
    normal = F.layer_norm(raw, raw.shape[-1:], eps=NORM_EPS) if spec.is_linear else layer_norm(raw)[0]
    return x + normal * gain + bias


def apply(spec: MemorySpec, weights: list[Tensor], x: Tensor, norm: Norm | None) -> Tensor:
    """f_W(x) for inputs (..., n, D) and weights (..., d_in, d_out)."""
    activation = ACTIVATIONS[spec.activation].value
    raw = x
    for i, w in enumerate(weights):
        raw = raw @ w
        if i + 1 < len(weights):
            raw = activation(raw)
    return output(spec, x, raw, norm)


def raw_descent(spec: MemorySpec, raw: Tensor, k: Tensor, v: Tensor, delta: Tensor | None, norm: Norm | None) -> Tensor:
    """-dl/dz_L from the MLP's output z_L = raw, the keys and the values, all (..., n, D)."""
    if not spec.residual:
        return output_descent(spec, raw, v, delta)
    assert norm is not None
    gain, bias = norm
    normal, rstd = layer_norm(raw)
    g = output_descent(spec, k + normal * gain + bias, v, delta) * gain
    return rstd * (g - g.mean(-1, keepdim=True) - normal * (g * normal).mean(-1, keepdim=True))


def descent(
    spec: MemorySpec,
    weights: list[Tensor],
    k: Tensor,
    v: Tensor,
    delta: Tensor | None,
    norm: Norm | None,
    with_slope: WithSlope | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs a_{l-1} (..., n, d_in) and deltas -dl/dz_l (..., n, d_out) of every layer for n pairs (k, v).

    with_slope: another way to work out what the activation's own does.
    """
    with_slope = with_slope or ACTIVATIONS[spec.activation].with_slope
    inputs, slopes = [k], []
    for w in weights[:-1]:
        a, slope = with_slope(inputs[-1] @ w)
        inputs.append(a)
        slopes.append(slope)
    deltas = [raw_descent(spec, inputs[-1] @ weights[-1], k, v, delta, norm)]
    for i in range(len(weights) - 1, 0, -1):
        deltas.append((deltas[-1] @ weights[i].mT) * slopes[i - 1])
    return inputs, deltas[::-1]
