"""Kernels that were not yet used on a device are held to the torch form once, before anything is trained by them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_dist.memory.chunked import dual_form
from titans_dist.memory.kernels import kernel_form
from titans_dist.memory.spec import MemorySpec
from titans_dist.memory.state import initial_state
from titans_dist.memory.tokens import Tokens

BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest relative error of any output or gradient in `failed_check`: wrong kernels are far beyond, rounding is not."""


@functools.cache
def failed_check(
    spec: MemorySpec, head_dim: int, chunk_size: int, read: str, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Holds kernels that were not yet used on this device to the torch form, on two chunks and a half.

    A compiler's or a driver's fault must not become a model's: returns what differs, in words, or None.
    """
    return apart(device, lambda: _check(spec, head_dim, chunk_size, read, dtype, device))


def apart(device: torch.device, check: Callable[[], str | None]) -> str | None:
    """`check()` in a thread of its own: what surrounds the first use must not see it.

    Checkpointing would count its tensors among those of the block it saves; no_grad and autocast would change it.
    """

    def run() -> str | None:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return check()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def _check(
    spec: MemorySpec, head_dim: int, chunk_size: int, read: str, dtype: torch.dtype, device: torch.device
) -> str | None:
    g = torch.Generator().manual_seed(0)
    shape = (1, 2 * chunk_size + (chunk_size + 1) // 2, 2)

    def random(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*sizes, generator=g) * scale).to(device)

    def leaf(x: Tensor) -> Tensor:
        return x.to(dtype).float().requires_grad_()

    q, k = (leaf(F.normalize(random(*shape, head_dim), dim=-1)) for _ in range(2))
    v = leaf(random(*shape, head_dim))
    alpha, eta, theta = (leaf(random(*shape).sigmoid() * top) for top in (0.02, 0.9, 1 / chunk_size))
    sizes = zip(spec.shapes(head_dim), spec.initial_std(head_dim), strict=True)
    weights = [random(2, *size, scale=std).requires_grad_() for size, std in sizes]
    norm = (leaf(1 + random(2, head_dim, scale=0.1)), leaf(random(2, head_dim, scale=0.1)))
    rows = (norm[0].unsqueeze(1), norm[1].unsqueeze(1))
    delta = leaf(random(*shape).abs() + head_dim**0.5 / 2)
    state, given = initial_state(spec, weights, 1), norm if spec.residual else None
    leaves = [q, k, v, theta, *weights, *(norm if spec.residual else ())]
    leaves += [x for x, used in ((alpha, spec.retention != "none"), (eta, spec.momentum)) if used]

    def results(by_kernels: bool) -> list[Tensor]:
        q_, k_, v_ = ((x.to(dtype) if by_kernels else x) for x in (q, k, v))
        gates = (None if spec.retention == "none" else alpha, eta if spec.momentum else None, theta)
        tokens = Tokens(q_, k_, v_, *gates, delta if spec.bias == "huber" else None, None)
        if by_kernels:
            y, after = kernel_form(spec, tokens, given, rows, state, state, chunk_size, read, True, None)
        else:
            given_rows = rows if spec.residual else None
            y, after = dual_form(spec, tokens, given_rows, state, state, chunk_size, read, False, None, False)
        found = [y.float(), *after.weights, *after.momentum]
        weighted = sum((x * torch.linspace(1, 2, x.numel(), device=device).view_as(x)).sum() for x in found)
        assert isinstance(weighted, Tensor)
        grads = torch.autograd.grad(weighted, leaves, allow_unused=True)
        return [*found, *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True))]

    try:
        found = results(True)
    except Exception as error:  # a compiler's and a driver's own kinds are many
        return f"on this device they do not run: {error}"
    pairs = zip(found, results(False), strict=True)
    return difference(list(pairs), dtype)


def difference(pairs: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> str | None:
    """By how much what kernels found differs from what torch has, in words, or None: not by more than rounding."""
    errors = [
        (a.detach().float() - b.detach().float()).norm() / b.detach().float().norm().clamp_min(1e-6) for a, b in pairs
    ]
    error = float(torch.stack(errors).max())
    if error <= BOUNDS[dtype]:
        return None
    return f"on this device they differ from the torch form, relative error {error:.1e}"
