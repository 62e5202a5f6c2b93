"""`scan`: what a share of the sequence does to an affine memory is known before the memory is.

Let Z be the state of one head, (W, S) on top of each other. Over any run of tokens, with everything the tokens bring
held fixed, Z' = M Z + N and token t reads y_t = r_t Z + y0_t. Two calls give all four, three with momentum: from
Z = 0 with the values (N and y0), and from the unit states without them (M and r). Every process makes those of its own
tokens, one gather hands M and N to all, and each composes what came before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from titans_dist.memory import MemoryState
from titans_dist.parallel.context.exchange import stacked
from titans_dist.parallel.context.group import Context


class ScanMemory:
    """`neural_memory` on shares of sequences, for memories that `is_affine`."""

    def __init__(self, operator: Callable[..., tuple[Tensor, MemoryState]], context: Context) -> None:
        self.operator, self.context = operator, context

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, MemoryState]:
        """See `neural_memory`. Gradients are exact: `state_grad_clip` is for memories that can explode."""
        state, start = options["state"], options["start"]
        unit = _units(state)
        runs = len(unit) + 1  # stacked as more rows of the batch: first Z = 0, then the unit states
        options = {name: _repeated(x, runs) if isinstance(x, Tensor) else x for name, x in options.items()}
        nothing = state.map(torch.zeros_like)
        options["state"] = _batched([nothing, *unit])
        options["start"] = None if start is None else _batched([start, *[nothing] * len(unit)])
        options["state_grad_clip"] = None
        values = torch.cat([v, torch.zeros_like(v).repeat(len(unit), 1, 1, 1)])
        y, end = self.operator(_repeated(q, runs), _repeated(k, runs), values, **options)

        offset, *columns = _stack(end).chunk(runs)
        before = self._before(torch.cat([*columns, offset], -1), _stack(state))  # (B, H, d or 2d, d)
        own, *responses = y.chunk(runs)
        # One token's answer to the unit states is the row that its query takes from any state.
        row = torch.cat(responses, -1)
        y = own + torch.einsum("bthz,bhzd->bthd", row.to(before.dtype), before).to(own.dtype)
        after = torch.cat(columns, -1) @ before + offset
        return y, _unstack(after, len(unit))

    def _before(self, change: Tensor, first: Tensor) -> Tensor:
        """The state that this process's tokens find. All processes make all steps: every backward pass is the same."""
        z = first
        for rank, of_rank in enumerate(stacked(change, self.context)):
            size = z.shape[-2]
            z = torch.where(
                torch.tensor(rank < self.context.rank, device=z.device),
                of_rank[..., :size] @ z + of_rank[..., size:],
                z,
            )
        return z


def _units(state: MemoryState) -> list[MemoryState]:
    """The states whose W, or S, is the identity and the other zero."""
    zero = torch.zeros_like(state.weights[0])
    one = torch.eye(zero.shape[-1], dtype=zero.dtype, device=zero.device).expand_as(zero)
    if not state.momentum:
        return [MemoryState([one])]
    return [MemoryState([one], [zero]), MemoryState([zero], [one])]


def _stack(state: MemoryState) -> Tensor:
    return torch.cat([state.weights[0], *state.momentum], -2)


def _unstack(z: Tensor, count: int) -> MemoryState:
    weights, *momentum = z.chunk(count, -2)
    return MemoryState([weights], momentum)


def _batched(states: list[MemoryState]) -> MemoryState:
    weights = torch.cat([s.weights[0] for s in states])
    return MemoryState([weights], [torch.cat([s.momentum[0] for s in states])] if states[0].momentum else [])


def _repeated(x: Tensor, times: int) -> Tensor:
    return x.repeat(times, *[1] * (x.dim() - 1))
