"""The inner gradient at the MLP's output in few operations, and its adjoint: a second derivative, written out.

With n = normal(raw), h = -gain dl/df and d = rstd (h - mean(h) - n mean(h n)) the descent: d depends on raw through
f(n) in h, through n beside it and through rstd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_dist.memory.bias import output_descent, pull_back
from titans_dist.memory.network import NORM_EPS, Norm
from titans_dist.memory.spec import MemorySpec


def raw_descent(
    spec: MemorySpec, raw: Tensor, shifted: Tensor, v: Tensor, delta: Tensor | None, norm: Norm | None
) -> Tensor:
    """`network.raw_descent` without a graph; `shifted` is k plus the norm's bias."""
    if norm is None:
        return output_descent(spec, raw, v, delta)
    normal, mean, rstd = torch.native_layer_norm(raw, raw.shape[-1:], None, None, NORM_EPS)
    h = output_descent(spec, torch.addcmul(shifted, normal, norm[0]), v, delta) * norm[0]
    return _through_norm(h, raw, mean, rstd)


class Descent:
    """Its adjoint, for N chunks up to what depends on the gradient: raw, d, k, v (N, G, b, D), delta (N, G, b)."""

    def __init__(
        self, spec: MemorySpec, raw: Tensor, d: Tensor, k: Tensor, v: Tensor, delta: Tensor | None, norm: Norm | None
    ) -> None:
        self.spec, self.norm, f = spec, norm, raw
        if norm is not None:
            self.normal, mean, rstd = torch.native_layer_norm(raw, raw.shape[-1:], None, None, NORM_EPS)
            f = torch.addcmul(k + norm[1], self.normal, norm[0])
            self.outer = output_descent(spec, f, v, delta)
            h = self.outer * norm[0]
            mean_hn = (h * self.normal).mean(-1, keepdim=True)
            both = torch.stack([self.normal, d], -2)
            parts = (raw, mean, rstd, both, rstd * mean_hn, rstd * h, rstd * self.normal)
            self.parts = list(zip(*(x.unbind(0) for x in parts), strict=True))
        self.f, self.v, self.delta = f.unbind(0), v.unbind(0), None if delta is None else delta.unbind(0)
        # From the last chunk to the first, gradients at the values, delta, h and f.
        self.found: list[tuple[Tensor, Tensor | None, Tensor, Tensor]] = []

    def back(self, n: int, g: Tensor) -> Tensor:
        """From the gradient g (G, b, D) at chunk n's descent to that at its `raw`. Chunks come last first."""
        delta = None if self.delta is None else self.delta[n]
        if self.norm is None:
            g_f, g_v, g_delta = pull_back(self.spec, g, self.f[n], self.v[n], delta)
            self.found.append((g_v, g_delta, g, g_f))
            return g_f
        raw, mean, rstd, both, of_g, of_h, of_n = self.parts[n]
        gain = self.norm[0]
        g_h = _through_norm(g, raw, mean, rstd)
        g_f, g_v, g_delta = pull_back(self.spec, g_h * gain, self.f[n], self.v[n], delta)
        self.found.append((g_v, g_delta, g_h, g_f))
        mean_gn, mean_gd = (g.unsqueeze(-2) * both).mean(-1, keepdim=True).unbind(-2)
        g_normal = (g_f * gain).addcmul_(g, of_g, value=-1).addcmul_(of_h, mean_gn, value=-1)
        return _through_norm(g_normal, raw, mean, rstd).addcmul_(of_n, mean_gd, value=-1)

    def gradients(self) -> tuple[Tensor | None, Tensor, Tensor | None, Norm | None]:
        """At the keys beside the network, the values, Huber's delta and the norm, after all chunks."""
        g_v, g_delta, g_h, g_f = zip(*reversed(self.found), strict=True)
        of_delta = None if self.delta is None else torch.stack(g_delta)
        if self.norm is None:
            return None, torch.stack(g_v), of_delta, None
        of_f = torch.stack(g_f)
        of_gain = torch.stack(g_h).mul_(self.outer).addcmul_(of_f, self.normal).sum((0, 2)).unsqueeze(1)
        return of_f, torch.stack(g_v), of_delta, (of_gain, of_f.sum((0, 2)).unsqueeze(1))


def _through_norm(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """rstd (g - mean(g) - n mean(g n)), the LayerNorm's own backward."""
    backward = torch.ops.aten.native_layer_norm_backward
    return backward(grad, x, x.shape[-1:], mean, rstd, None, None, [True, False, False])[0]
