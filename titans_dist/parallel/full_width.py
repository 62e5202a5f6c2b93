"""Tensor parallelism of a memory of one head: the processes share out its hidden units, not its heads.

Projections and convolutions have their own channels on each process, as ever. Their outputs are gathered, because the
memory reads whole keys; its own output is whole on every process, which takes its channels of it to the output gate.
"""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from torch import Tensor, nn
from torch.nn import functional as F

from titans_dist.layers.inner_memory import InnerMemory
from titans_dist.layers.neural_memory import NeuralMemory
from titans_dist.layers.norm import head_norm
from titans_dist.memory import MemoryState
from titans_dist.memory.hidden import shared_out
from titans_dist.parallel.regions import enter, total


def share_out_hidden_units(model: nn.Module) -> None:
    """Give the memories of `model` their form for several processes to one head."""
    for module in model.modules():
        if isinstance(module, NeuralMemory):
            module.__class__ = FullWidthMemory
        elif isinstance(module, InnerMemory):
            module.kernel = _kernel


class FullWidthMemory(NeuralMemory):
    """(B, T, hidden) -> this process's channels of the output, (B, T, 1, hidden / tp)."""

    def _heads(self, x: Tensor) -> Tensor:
        return gather_from_tensor_model_parallel_region(x).unflatten(-1, (-1, self.head_dim))

    def _gated(self, x: Tensor, y: Tensor) -> Tensor:
        whole = head_norm(y, self.norm.weight, self.norm.eps)
        return scatter_to_tensor_model_parallel_region(whole) * F.silu(self.gate(x)).unsqueeze(2)


class InputLinear(nn.Module):
    """A linear layer of few outputs whose inputs the processes share out; (B, T, d_in) -> (B, T, d_out), both whole."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        # A slice, not a scatter: the region's entrance sums the gradients of all slices.
        own, rank = self.weight.shape[1], parallel_state.get_tensor_model_parallel_rank()
        y = total(F.linear(x[..., rank * own : (rank + 1) * own], self.weight))
        return y if self.bias is None else y + self.bias


def _kernel(
    q: Tensor, k: Tensor, v: Tensor, *, weights: list[Tensor], backend: str, state_grad_clip: Any, **given: Any
) -> tuple[Tensor, MemoryState]:
    """`neural_memory`; the form for one token and the limit on gradients are those of one process and not used here."""
    given.pop("start", None)
    given.pop("starts", None)
    read = given.pop("read", "after")
    return shared_out(q, k, v, read=read, enter=enter, total=total, **given)
