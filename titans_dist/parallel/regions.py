"""megatron-core's two borders of a tensor-parallel region, safe for tensors that are not contiguous.

Its all-reduce (0.16.1) makes a contiguous copy where it must, sums the copy over the processes, and returns the tensor
that it was given: of what is not contiguous nothing is summed, and nothing says so.
"""

from __future__ import annotations

from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor


def enter(x: Tensor) -> Tensor:
    """The same tensor on every process, whose gradient is the sum of theirs."""
    y = copy_to_tensor_model_parallel_region(x)
    if y.requires_grad:
        y.register_hook(Tensor.contiguous)
    return y


def total(x: Tensor) -> Tensor:
    """The sum over the processes, on each of them; its gradient goes to all as it is."""
    return reduce_from_tensor_model_parallel_region(x.contiguous())
