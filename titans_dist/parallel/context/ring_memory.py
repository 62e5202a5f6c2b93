"""The memory operator as a wave of groups of sequences and heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from titans_dist.config import ParallelConfig
from titans_dist.config.layout import context_groups
from titans_dist.memory import MemoryState
from titans_dist.memory.grad_clip import StateGradClip
from titans_dist.parallel.context.group import Context
from titans_dist.parallel.context.heads import GATES
from titans_dist.parallel.context.ring import Group, wavefront


class RingMemory:
    """`neural_memory` on shares of sequences, for any memory."""

    def __init__(
        self, operator: Callable[..., tuple[Tensor, MemoryState]], parallel: ParallelConfig, context: Context
    ) -> None:
        self.operator, self.parallel, self.context = operator, parallel, context

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, MemoryState]:
        """See `neural_memory`. The state returned carries no gradient."""
        rows, heads = q.shape[0], q.shape[2]
        count = context_groups(self.parallel, rows, heads)
        cut = _Cut(min(count, rows), max(1, count // rows))
        tokens = {"q": q, "k": k, "v": v, **{gate: options.pop(gate) for gate in GATES}}
        names = [name for name, x in tokens.items() if x is not None]
        columns = [cut.tokens(tokens[name]) for name in names]
        starts, start, norm = options.pop("starts"), options.pop("start"), options.pop("norm")
        if starts is not None:  # the state that documents begin with is needed only where some do
            columns += [cut.rows(starts), *(cut.state(x) for x in _tensors(start))]
        if norm is not None:
            columns += [cut.weights(x) for x in norm]
        state, weights, limit = options.pop("state"), options.pop("weights"), options.pop("state_grad_clip")
        states = zip(*(cut.state(x) for x in _tensors(state)), strict=True)
        groups = [
            Group(list(inputs), list(own)) for inputs, own in zip(zip(*columns, strict=True), states, strict=True)
        ]
        shapes = [cut.weights(w.detach()) for w in weights]  # the state is given, so only their shapes count

        def cell(
            inputs: list[Tensor], own: list[Tensor], shared: list[Tensor], clip: StateGradClip | None
        ) -> tuple[Tensor, list[Tensor]]:
            given = iter(inputs)
            arguments: dict[str, Any] = {gate: None for gate in GATES} | {name: next(given) for name in names}
            arguments["starts"] = None if starts is None else next(given)
            arguments["start"] = None if starts is None else _like(start, [next(given) for _ in _tensors(start)])
            arguments["norm"] = None if norm is None else (next(given), next(given))
            y, after = self.operator(
                **options, **arguments, weights=[w[0] for w in shapes], state=_like(state, own), state_grad_clip=clip
            )
            return y, _tensors(after)

        outputs, ends = wavefront(cell, groups, [], limit, self.context)
        end = [cut.together(parts) for parts in zip(*ends, strict=True)]
        return cut.together(outputs, 2), _like(state, end)


class _Cut:
    """Groups of rows, and within them of heads."""

    def __init__(self, row_groups: int, head_groups: int) -> None:
        self.row_groups, self.head_groups = row_groups, head_groups

    def tokens(self, x: Tensor) -> list[Tensor]:
        """(B, T, H, ...)."""
        return [part for rows in x.chunk(self.row_groups) for part in rows.chunk(self.head_groups, 2)]

    def state(self, x: Tensor) -> list[Tensor]:
        """(B, H, d_in, d_out)."""
        return [part for rows in x.chunk(self.row_groups) for part in rows.chunk(self.head_groups, 1)]

    def rows(self, x: Tensor) -> list[Tensor]:
        """(B, T)."""
        return [rows for rows in x.chunk(self.row_groups) for _ in range(self.head_groups)]

    def weights(self, x: Tensor) -> list[Tensor]:
        """(H, ...)."""
        return list(x.chunk(self.head_groups)) * self.row_groups

    def together(self, parts: Any, heads: int = 1) -> Tensor:
        """The whole again; `heads` is the dimension of the heads."""
        rows = [torch.cat(parts[i : i + self.head_groups], heads) for i in range(0, len(parts), self.head_groups)]
        return torch.cat(rows)


def _tensors(state: MemoryState) -> list[Tensor]:
    """What is handed on between two chunks."""
    return [*state.weights, *state.momentum]


def _like(state: MemoryState, tensors: list[Tensor]) -> MemoryState:
    return replace(state, weights=tensors[: len(state.weights)], momentum=tensors[len(state.weights) :])
