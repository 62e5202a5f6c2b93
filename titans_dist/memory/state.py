"""The memory between two calls, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from titans_dist.memory.spec import MemorySpec


@dataclass
class MemoryState:
    """What a memory is after some token: tensors (B, H, d_in, d_out), one per layer, float32 (float64 for float64
    inputs).

    `weights` is W, or for the retentions with a link (see `titans_dist.memory.retention`) what W is the link of.
    `momentum` is the running surprise S; empty for a memory without momentum.
    Between two chunks that is all. Inside one, `position` tokens of it are written, its gradients are taken at
    `anchor`, and `kept` (B, H) is the share of that anchor which forgetting has left.
    """

    weights: list[Tensor]
    momentum: list[Tensor] = field(default_factory=list)
    anchor: list[Tensor] = field(default_factory=list)
    kept: Tensor | None = None
    position: int = 0

    def map(self, change: Callable[[Tensor], Tensor]) -> MemoryState:
        """The same state with every tensor changed, such as by `Tensor.detach`."""
        weights, momentum, anchor = ([change(x) for x in xs] for xs in (self.weights, self.momentum, self.anchor))
        kept = None if self.kept is None else change(self.kept)
        return MemoryState(weights, momentum, anchor, kept, self.position)


def initial_state(spec: MemorySpec, weights: list[Tensor], batch: int) -> MemoryState:
    """The state before the first token: W_0 (H, d_in, d_out) for each of `batch` sequences, and S_0 = 0."""
    accumulate = torch.promote_types(weights[0].dtype, torch.float32)
    start = [w.to(accumulate).expand(batch, *w.shape) for w in weights]
    return MemoryState(start, [torch.zeros_like(w) for w in start] if spec.momentum else [])
