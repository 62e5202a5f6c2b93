"""The memory recurrence by autograd, one token and one head at a time: slow, obvious and independent of the library.

Only the formulas of the Titans paper (eqs 12-18) are here: the inner loss is written as a loss and differentiated by
torch.autograd, the per-token memories are materialized, nothing is batched over heads or sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "identity": lambda x: x,
}


@dataclass
class Case:
    """Arguments of one call, in the library's layout: (B, T, H, D), gates (B, T, H), weights (H, d_in, d_out)."""

    q: Tensor
    k: Tensor
    v: Tensor
    alpha: Tensor
    eta: Tensor
    theta: Tensor
    weights: list[Tensor]
    gain: Tensor
    bias: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.q, self.k, self.v, self.alpha, self.eta, self.theta, *self.weights, self.gain, self.bias]


def random_case(batch: int, length: int, heads: int, dim: int, shapes: list[tuple[int, int]], seed: int) -> Case:
    """Float64 arguments at which the recurrence stays small, all requiring gradients."""
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    case = Case(
        q=F.normalize(normal(batch, length, heads, dim), dim=-1),
        k=F.normalize(normal(batch, length, heads, dim), dim=-1),
        v=normal(batch, length, heads, dim),
        alpha=0.3 * uniform(batch, length, heads),
        eta=0.9 * uniform(batch, length, heads),
        theta=0.02 * uniform(batch, length, heads),
        weights=[normal(heads, *shape) * shape[0] ** -0.5 for shape in shapes],
        gain=0.5 + uniform(heads, dim),
        bias=0.1 * normal(heads, dim),
    )
    for tensor in case.tensors():
        tensor.requires_grad_()
    return case


def memory(x: Tensor, weights: list[Tensor], activation: str, residual: bool, gain: Tensor, bias: Tensor) -> Tensor:
    """f_W(x) for one vector (D,)."""
    h = x
    for i, w in enumerate(weights):
        h = h @ w
        if i + 1 < len(weights):
            h = ACTIVATION[activation](h)
    return x + F.layer_norm(h, h.shape, gain, bias, eps=1e-6) if residual else h


def run(
    case: Case, *, activation: str, residual: bool, momentum: bool, chunk_size: int, read: str
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """y (B, T, H, D), W and S after the last token, each layer (B, H, d_in, d_out). Differentiable."""
    batch, length, heads, _ = case.q.shape
    layers = range(len(case.weights))
    y: dict[tuple[int, int], Tensor] = {}
    final: dict[tuple[int, int], list[Tensor]] = {}
    surprise: dict[tuple[int, int], list[Tensor]] = {}
    for b in range(batch):
        for h in range(heads):
            gain, bias = case.gain[h], case.bias[h]
            w = [layer[h] for layer in case.weights]
            s = [torch.zeros_like(layer) for layer in w]
            anchor, outputs = w, []
            for t in range(length):
                if t % chunk_size == 0:
                    anchor = w
                k, v, q = case.k[b, t, h], case.v[b, t, h], case.q[b, t, h]
                loss = (memory(k, anchor, activation, residual, gain, bias) - v).square().sum()
                u = torch.autograd.grad(loss, anchor, create_graph=True)
                alpha, eta, theta = case.alpha[b, t, h], case.eta[b, t, h], case.theta[b, t, h]
                before = w
                s = [(eta * a if momentum else 0) - theta * g for a, g in zip(s, u, strict=True)]
                w = [(1 - alpha) * a + g for a, g in zip(w, s, strict=True)]
                outputs.append(memory(q, w if read == "after" else before, activation, residual, gain, bias))
            y[b, h], final[b, h], surprise[b, h] = torch.stack(outputs), w, s

    def over_heads(per_head: dict[tuple[int, int], Tensor], dim: int) -> Tensor:
        return torch.stack([torch.stack([per_head[b, h] for h in range(heads)], dim) for b in range(batch)])

    def layer(states: dict[tuple[int, int], list[Tensor]], i: int) -> Tensor:
        return over_heads({key: value[i] for key, value in states.items()}, 0)

    return over_heads(y, 1), [layer(final, i) for i in layers], [layer(surprise, i) for i in layers]
