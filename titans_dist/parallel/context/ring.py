"""`ring`: the state is handed on from one share of a sequence to the next, as a wave.

Process r can begin only with what process r - 1 has left. So the work is divided into G groups that do not depend on
each other, sequences and heads. While group 0 is with process 1, process 0 works on group 1:

    process 0   0 1 2 3 . .
    process 1   . 0 1 2 3 .        G = 4 groups, R = 3 processes
    process 2   . . 0 1 2 3        each waits (R - 1) of G + R - 1 turns

The backward pass is the same wave from the last process to the first. Both are written out below as what they are,
loops over groups; nothing depends on the order in which autograd would visit them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titans_dist.memory.grad_clip import StateGradClip
from titans_dist.parallel.context.group import Context

Cell = Callable[[list[Tensor], list[Tensor], list[Tensor], StateGradClip | None], tuple[Tensor, list[Tensor]]]
"""(a group's inputs, its state, what all groups share, the clip of its states) -> (its output (B, T, H, D), the state
after)."""

turns: list[tuple[str, int]] | None = None
"""Where it is a list, what this process does is noted: ("begin", 0), then ("receive" | "work" | "send", group)."""


@dataclass
class Group:
    """One group of rows or heads: inputs of the cell, and the state that the first process begins with."""

    inputs: list[Tensor]
    state: list[Tensor]


@dataclass
class _Done:
    """What the backward pass of one group needs."""

    leaves: list[Tensor]
    outputs: list[Tensor]
    clip: StateGradClip | None


def wavefront(
    cell: Cell, groups: list[Group], shared: list[Tensor], limit: float | None, context: Context
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Run `cell` on every group, each from the state that the process before has left of it.

    `limit` is the memory's `state_grad_clip`, relative to the outputs of the whole sequence on all processes. Returns
    the groups' outputs, and their states after this process's tokens, which carry no gradient.
    """
    shape = (len(groups), len(groups[0].inputs), len(groups[0].state))
    flat = [x for group in groups for x in (*group.inputs, *group.state)]
    results = _Wavefront.apply(cell, shape, limit, context, torch.is_grad_enabled(), *flat, *shared)
    ends = list(results[len(groups) :])
    return list(results[: len(groups)]), [ends[i : i + shape[2]] for i in range(0, len(ends), shape[2])]


class _Wavefront(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        cell: Cell,
        shape: tuple[int, int, int],
        limit: float | None,
        context: Context,
        needs_grad: bool,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        count, n_inputs, n_states = shape
        per_group = n_inputs + n_states
        shared = [_leaf(x) for x in tensors[count * per_group :]]
        link = _Link(context.before, context.after, context)
        outputs, ends, done = [], [], []
        _note("begin", 0)
        incoming = [link.expect(tensors[g * per_group + n_inputs : (g + 1) * per_group]) for g in range(count)]
        for g in range(count):
            inputs = [_leaf(x) for x in tensors[g * per_group : g * per_group + n_inputs]]
            found = link.receive(incoming[g], g)
            own = tensors[g * per_group + n_inputs : (g + 1) * per_group]
            state = [_leaf(x) for x in own] if found is None else [x.requires_grad_() for x in found]
            clip = None if limit is None else StateGradClip(limit, is_shared=context.rank > 0)
            _note("work", g)
            # Whatever the outer graph does with saved tensors is not for this one: a checkpoint around it would run the
            # block anew inside a backward pass that other processes wait for.
            with torch.set_grad_enabled(needs_grad), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
                y, after = cell(inputs, state, shared, clip)
            link.send(after, g)
            outputs.append(y.detach())
            ends += [x.detach() for x in after]
            if needs_grad:
                done.append(_Done([*inputs, *state], [y, *after], clip))
        link.finish()
        ctx.done, ctx.shared, ctx.shape, ctx.limit, ctx.context = done, shared, shape, limit, context
        ctx.mark_non_differentiable(*ends)
        return (*outputs, *ends)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        count, n_inputs, _ = ctx.shape
        context, shared = ctx.context, ctx.shared
        largest = None if ctx.limit is None else _largest(grads[:count], ctx.limit, context)
        link = _Link(context.after, context.before, context)
        by_group: list[list[Tensor | None]] = [[] for _ in range(count)]
        for_shared: list[Tensor | None] = [None] * len(shared)
        _note("begin", 0)
        incoming = [link.expect(ctx.done[g].outputs[1:]) for g in range(count)]
        for g in range(count):
            done = ctx.done[g]
            if largest is not None:
                done.clip.largest = largest[g]
            found = link.receive(incoming[g], g)
            outputs = done.outputs if found is not None else done.outputs[:1]
            _note("work", g)
            wanted = [x for x in (*done.leaves, *shared) if x.requires_grad]
            made = iter(torch.autograd.grad(outputs, wanted, [grads[g], *(found or [])], allow_unused=True))
            every = [next(made) if x.requires_grad else None for x in (*done.leaves, *shared)]
            for_state = [
                _filled(g, x) for g, x in zip(every[n_inputs : len(done.leaves)], done.leaves[n_inputs:], strict=True)
            ]
            link.send(for_state, g)
            # The state that others have left is not this process's own: its own gets zeros, which the gradient buckets
            # of data parallelism wait for.
            own = for_state if context.before is None else [torch.zeros_like(x) for x in for_state]
            by_group[g] = [*every[:n_inputs], *own]
            for i, grad in enumerate(every[len(done.leaves) :]):
                for_shared[i] = _sum(for_shared[i], grad)
            ctx.done[g] = None
        link.finish()
        of_shared = [_filled(g, x) if x.requires_grad else None for g, x in zip(for_shared, shared, strict=True)]
        return (None,) * 5 + (*(grad for group in by_group for grad in group), *of_shared)


@dataclass
class _Message:
    """One that is under way, and tensors like those in it."""

    request: Any
    buffer: Tensor
    like: list[Tensor]


class _Link:
    """One process's place in the wave: messages of one (W, S) each, from `source` and on to `target`."""

    def __init__(self, source: int | None, target: int | None, context: Context) -> None:
        self.source, self.target, self.context = source, target, context
        self._sent: list[tuple[Any, Tensor]] = []

    def expect(self, like: Sequence[Tensor]) -> _Message | None:
        """Get ready for a message of tensors like these; None where nobody sends."""
        if self.source is None:
            return None
        buffer = like[0].new_empty(sum(x.numel() for x in like), dtype=_widest(like))
        return _Message(dist.irecv(buffer, src=self.source, group=self.context.group), buffer, list(like))

    def receive(self, message: _Message | None, group: int) -> list[Tensor] | None:
        """Wait for the message of a group."""
        if message is None:
            return None
        message.request.wait()
        _note("receive", group)
        parts = message.buffer.split([x.numel() for x in message.like])
        return [part.view(x.shape).to(x.dtype) for part, x in zip(parts, message.like, strict=True)]

    def send(self, tensors: list[Tensor], group: int) -> None:
        """Hand tensors on, without waiting for them to arrive."""
        if self.target is None:
            return
        _note("send", group)
        message = torch.cat([x.detach().flatten().to(_widest(tensors)) for x in tensors])
        self._sent.append((dist.isend(message, dst=self.target, group=self.context.group), message))

    def finish(self) -> None:
        """Wait until all has been sent."""
        for request, _ in self._sent:
            request.wait()


def waves(ranks: list[list[tuple[str, int]]]) -> list[list[list[tuple[str, int]]]]:
    """The turns that the processes of one ring have noted, wave by wave, each from its first process to its last."""
    by_rank: list[list[list[tuple[str, int]]]] = []
    for turns in ranks:
        by_rank.append([])
        for what, group in turns:
            if what == "begin":
                by_rank[-1].append([])
            else:
                by_rank[-1][-1].append((what, group))
    found = [list(wave) for wave in zip(*by_rank, strict=True)]
    return [wave if wave[0][0][0] == "work" else wave[::-1] for wave in found]


def waiting(wave: list[list[tuple[str, int]]]) -> float:
    """Share of the time that a process of one wave waits, were every group's work one turn and a message none.

    Replayed from what each process did, in its order; a message can be received once it is sent.
    """
    clock, place = [0] * len(wave), [0] * len(wave)
    sent: dict[tuple[int, int], int] = {}
    while any(place[r] < len(turns) for r, turns in enumerate(wave)):
        for r, turns in enumerate(wave):
            while place[r] < len(turns):
                what, group = turns[place[r]]
                if what == "receive":
                    if (r - 1, group) not in sent:
                        break
                    clock[r] = max(clock[r], sent[r - 1, group])
                elif what == "send":
                    sent[r, group] = clock[r]
                else:
                    clock[r] += 1
                place[r] += 1
    works = sum(what == "work" for turns in wave for what, _ in turns)
    return 1 - works / (len(wave) * max(clock))


def _largest(grads: tuple[Tensor, ...], limit: float, context: Context) -> list[Tensor]:
    """Per group what its states' gradients may be at most, (B H,): `limit` times the norm at the whole sequence's
    outputs."""
    squares = [g.double().square().sum((1, 3)).flatten() for g in grads]
    total = torch.cat(squares)
    dist.all_reduce(total, group=context.group)
    return list((limit * total.sqrt()).split([len(x) for x in squares]))


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    """A type that holds all of them exactly."""
    return reduce(torch.promote_types, (x.dtype for x in tensors))


def _leaf(x: Tensor) -> Tensor:
    """The same numbers at the root of a graph of their own; a parameter is a root, and cells use it where it is."""
    return x if isinstance(x, nn.Parameter) else x.detach().requires_grad_(x.requires_grad)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _filled(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _note(what: str, group: int) -> None:
    if turns is not None:
        turns.append((what, group))
