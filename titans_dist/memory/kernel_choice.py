"""Whether the memory goes through `titans_kernels`, and the reason where it does not."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor

from titans_dist.config import ConfigError
from titans_dist.memory.kernel_check import failed_check
from titans_dist.memory.spec import MemorySpec

log = logging.getLogger(__name__)


class KernelError(ConfigError, ValueError):
    """Kernels were asked for that cannot be had."""


def lacking(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no kernel can run on such tensors for `backend` ("auto" or "triton"), or None.

    Where Triton interprets its kernels on the CPU, as tests ask it to, only "triton" goes through them.
    """
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1" and backend == "triton"
    if device.type != "cuda" and not (device.type == "cpu" and is_interpreted):
        return f"the tensors are on {device.type}, not on an NVIDIA GPU"
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("titans_kernels") is None:
        return 'triton is not installed (pip install "titans-dist[kernels]")'
    if dtype not in (torch.float32, torch.bfloat16):
        return f"{str(dtype).removeprefix('torch.')} has no kernels, float32 and bfloat16 have"
    return None


def uses_kernels(backend: str, lack: str | None) -> bool:
    """Whether `backend` goes through kernels that have this lack. "auto" says once on a GPU why it does not.

    Raises KernelError where "triton" is asked for and cannot be had.
    """
    if backend == "triton" and lack is not None:
        raise KernelError(f"backend='triton' cannot be had: {lack}; use backend='auto' or 'torch'")
    if backend == "auto" and lack is not None and torch.cuda.is_available():
        _say_once(lack)
    return backend in ("auto", "triton") and lack is None


@functools.cache
def _say_once(lack: str) -> None:
    log.warning("the memory goes without Triton kernels: %s", lack)


def lacking_for(backend: str, spec: MemorySpec, q: Tensor, chunk_size: int, read: str) -> str | None:
    """Why the memory's kernels cannot be used for q (B, T, H, D), or None."""
    here = lacking(backend, q.device, q.dtype)
    if here is not None:
        return here
    if not spec.is_linear:
        return f"retention {spec.retention!r} has no kernels, 'none' and 'l2' have"
    if spec.is_delta_rule:
        return "gradients at every token's own memory (anchor='token') have no kernels"
    if spec.channel_wise:
        return "channel-wise gates have no kernels"
    from titans_kernels.memory import unsupported

    missing = unsupported(q.dtype, q.shape[-1], spec.depth, chunk_size, spec.activation, spec.bias, read)
    if missing is not None:
        return f"there is no {missing}"
    return failed_check(spec, q.shape[-1], chunk_size, read, q.dtype, q.device) if q.is_cuda else None
