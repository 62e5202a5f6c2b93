"""Triton launches on the current device, which need not be the tensors'."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes x's GPU the current one for a while. Backward passes need it not: autograd does it."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
