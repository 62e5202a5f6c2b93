"""Attentional bias (MIRAS, section 4): the inner loss, and its gradient at the memory's output.

    l2      ||e||^2                                            e = f(k) - v
    dot     -2 <f(k), v>
    l1, lp  sum |e|^p (p = 1 for l1), gradient p tanh(a e) |e|^(p - 1) with |e| = sqrt(e^2 + 1e-6)
    huber   ||e||^2 where ||e|| <= delta, else 2 delta ||e|| - delta^2: twice Huber's, so that it goes on from l2

The gradients are these formulas, also where they are smooth stand-ins for the loss's own (l1, lp).
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_dist.memory.spec import MemorySpec

SMOOTH = 1e-6


def output_descent(spec: MemorySpec, f: Tensor, v: Tensor, delta: Tensor | None) -> Tensor:
    """-dl/df for outputs `f` and values `v` (..., n, D); `delta` (..., n) for huber."""
    if spec.bias == "dot":
        return 2 * v
    e = v - f
    if spec.bias == "l2":
        return 2 * e
    if spec.bias == "l1":
        return torch.tanh(spec.sharpness * e)
    if spec.bias == "lp":
        return spec.p * torch.tanh(spec.sharpness * e) * (e.square() + SMOOTH) ** ((spec.p - 1) / 2)
    assert delta is not None
    size, limit = _length(e), delta.unsqueeze(-1)
    return 2 * e * torch.where(size <= limit, torch.ones_like(size), limit / size)


def pull_back(
    spec: MemorySpec, grad: Tensor, f: Tensor, v: Tensor, delta: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`grad` (..., n, D) at `output_descent`'s result -> gradients at f, v and delta, written out."""
    if spec.bias == "dot":
        return torch.zeros_like(grad), 2 * grad, None
    if spec.bias == "l2":
        g_v = 2 * grad
        return -g_v, g_v, None
    e = v - f
    if spec.bias in ("l1", "lp"):
        power = 1.0 if spec.bias == "l1" else spec.p
        sign, square = torch.tanh(spec.sharpness * e), e.square() + SMOOTH
        slope = spec.sharpness * (1 - sign.square()) + (power - 1) * sign * e / square
        g_v = grad * slope * square ** ((power - 1) / 2) * power
        return -g_v, g_v, None
    assert delta is not None
    size, limit = _length(e), delta.unsqueeze(-1)
    unit, is_inside = e / size, size <= limit
    along = (unit * grad).sum(-1, keepdim=True)
    g_v = 2 * torch.where(is_inside, grad, (grad - unit * along) * limit / size)
    return -g_v, g_v, torch.where(is_inside, 0.0, 2 * along).squeeze(-1)


def inner_loss(spec: MemorySpec, f: Tensor, v: Tensor, delta: Tensor | None) -> Tensor:
    """l for outputs `f` and values `v` (..., n, D) -> (..., n)."""
    if spec.bias == "dot":
        return -2 * (f * v).sum(-1)
    e = f - v
    if spec.bias == "l2":
        return e.square().sum(-1)
    if spec.bias in ("l1", "lp"):
        return (e.square() + SMOOTH).pow((1.0 if spec.bias == "l1" else spec.p) / 2).sum(-1)
    assert delta is not None
    size = _length(e).squeeze(-1)
    return torch.where(size <= delta, size.square(), 2 * delta * size - delta.square())


def _length(e: Tensor) -> Tensor:
    """||e|| (..., 1), never zero: where() hands a zero gradient to the branch not taken, and 0 / 0 would spoil it."""
    return e.square().sum(-1, keepdim=True).clamp_min(torch.finfo(e.dtype).tiny).sqrt()
