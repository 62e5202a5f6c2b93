# mypy: disable-error-code="no-untyped-def"
"""The sigmoid, for kernels that have as many of them as bytes to move."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) in 5 instructions; `tl.sigmoid` takes 13, for denormal and huge numbers that are not there."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root
