"""The convolutions, and the norm and gate of the outputs, by the Triton kernels of `titans_kernels`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_dist.memory.kernel_check import apart, difference
from titans_dist.memory.kernel_choice import lacking, uses_kernels

MOST_TAPS = 32


def by_kernels(backend: str, x: Tensor, head_dim: int, taps: int) -> bool:
    """Whether the layer's work on x, for heads of `head_dim` and convolutions of `taps` tokens, goes by kernels."""
    if backend not in ("auto", "triton"):
        return False
    lack = lacking(backend, x.device, x.dtype)
    if lack is None and taps > MOST_TAPS:
        lack = f"convolutions over {taps} tokens have no kernels, up to {MOST_TAPS} have"
    if lack is None and x.is_cuda:
        lack = failed_check(head_dim, taps, x.dtype, x.device)
    return uses_kernels(backend, lack)


@functools.cache
def failed_check(head_dim: int, taps: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Holds the kernels to torch before their first use on a device; see `memory.kernel_check`."""
    return apart(device, lambda: _check(head_dim, taps, dtype, device))


def _check(head_dim: int, taps: int, dtype: torch.dtype, device: torch.device) -> str | None:
    from titans_kernels.norm_gate import norm_gate
    from titans_kernels.short_conv import short_conv

    g = torch.Generator().manual_seed(0)
    width = 2 * head_dim
    x, past, weight, y, gate, gain = (
        torch.randn(size, generator=g).to(device, dtype)
        for size in (
            (2, 70, width),
            (2, taps - 1, width),
            (width, taps),
            *[(2, 70, 2, head_dim)] * 2,
            (2, head_dim),
        )
    )

    def plain_conv(x: Tensor, past: Tensor, weight: Tensor) -> Tensor:
        mixed = F.conv1d(torch.cat([past, x], 1).mT, weight.unsqueeze(1), groups=width).mT
        return F.normalize(F.silu(mixed.unflatten(-1, (2, head_dim))), dim=-1)

    def plain_norm(y: Tensor, gate: Tensor, gain: Tensor) -> Tensor:
        return F.rms_norm(y, (head_dim,), eps=1e-6) * gain * F.silu(gate)

    def results(function: Callable[..., Tensor], given: tuple[Tensor, ...]) -> list[Tensor]:
        leaves = [z.detach().requires_grad_() for z in given]
        found = function(*leaves)
        weighted = (found.float() * torch.linspace(1, 2, found.numel(), device=device).view_as(found)).sum()
        return [found, *torch.autograd.grad(weighted, leaves)]

    pairs: list[tuple[Tensor, Tensor]] = []
    for kernel, plain, given in (
        (lambda x, past, weight: short_conv(x, past, weight, head_dim, True), plain_conv, (x, past, weight)),
        (lambda y, gate, gain: norm_gate(y, gate, gain, 1e-6), plain_norm, (y, gate, gain)),
    ):
        try:
            found = results(kernel, given)
        except Exception as error:  # a compiler's and a driver's own kinds are many
            return f"on this device they do not run: {error}"
        pairs += zip(found, results(plain, tuple(z.float() for z in given)), strict=True)
    return difference(pairs, dtype)
