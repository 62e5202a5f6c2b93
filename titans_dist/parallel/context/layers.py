"""The layers that look back in time, for processes that each hold a share of every sequence.

Each class is that of one process with another way to what lies before its tokens. `x` is this process's share of the
tokens, (B, T / size, ...); `starts` are those of the whole rows, (B, T), which every process knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from titans_dist.config import Config, ParallelConfig
from titans_dist.config.layout import context_groups, context_mode
from titans_dist.layers.attention import Attention, KeyValueCache, Prefix, causal_attention, window_attention
from titans_dist.layers.inner_memory import InnerMemory
from titans_dist.layers.mac import MemoryAsContext, SegmentState
from titans_dist.layers.neural_memory import LayerState, NeuralMemory
from titans_dist.layers.rotary import positions
from titans_dist.layers.state import map_tensors
from titans_dist.layers.tnt import TNTMemory
from titans_dist.memory import MemoryState
from titans_dist.memory.grad_clip import StateGradClip
from titans_dist.parallel.context.exchange import gathered, tokens_before
from titans_dist.parallel.context.group import Context, own_context
from titans_dist.parallel.context.heads import HeadsMemory
from titans_dist.parallel.context.ring import Group, wavefront
from titans_dist.parallel.context.ring_memory import RingMemory
from titans_dist.parallel.context.scan import ScanMemory


def split_model_along_context(model: nn.Module, config: Config) -> None:
    """Give the layers of `model` that look back in time their context-parallel forms."""
    context = own_context()
    if context.size == 1:
        return
    mode, parallel = context_mode(config), config.parallel
    for module in list(model.modules()):
        if isinstance(module, MemoryAsContext):
            _become(module, MemoryAsContextInShares, context=context, parallel=parallel)
    inside_mac = {id(part) for mac in model.modules() if isinstance(mac, MemoryAsContext) for part in mac.modules()}
    local = {id(tnt.shard) for tnt in model.modules() if isinstance(tnt, TNTMemory)}  # shards need no other one
    for module in list(model.modules()):
        if id(module) in inside_mac:
            continue
        if isinstance(module, Attention):
            _become(module, AttentionInShares, context=context)
        elif isinstance(module, NeuralMemory):
            _become(module, NeuralMemoryInShares, context=context)
        elif isinstance(module, InnerMemory) and id(module) not in local:
            forms: dict[str, Callable[..., Any]] = {
                "heads": lambda operator: HeadsMemory(operator, context),
                "ring": lambda operator: RingMemory(operator, parallel, context),
                "scan": lambda operator: ScanMemory(operator, context),
            }
            module.operator = forms[mode](module.operator)


def _become(module: nn.Module, form: type[nn.Module], **needed: Any) -> None:
    """Parameters, children and their names stay; only the way they are used changes."""
    module.__class__ = form
    for name, value in needed.items():
        setattr(module, name, value)


class AttentionInShares(Attention):
    """A window needs the keys and values of the tokens before, full attention those of all."""

    context: Context

    def forward(
        self,
        x: Tensor,
        persistent: Tensor | None,
        cache: KeyValueCache | None = None,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, KeyValueCache | None]:
        """See Attention; without a cache."""
        assert cache is None, "a cache is not split"
        own = x.shape[1]
        first = self.context.rank * own
        last = first + own
        starts = None if starts is None else starts[:, :last]
        position = positions(last, torch.zeros(1, dtype=torch.int64, device=x.device), starts)[:, first:]
        q, keys_values = self.queries(x, position), torch.stack(self.keys_values(x, position), 2)
        prefix = self.prefix(persistent)
        if self.window is None:
            seen = gathered(keys_values, self.context)[:, :last]
        else:
            seen = torch.cat([tokens_before(keys_values, self.window - 1, self.context), keys_values], 1)
        document = None if starts is None else starts.cumsum(1)[:, last - seen.shape[1] :]
        k, v = seen.unbind(2)
        if self.window is None:
            return causal_attention(q, k, v, prefix, document), None
        return window_attention(q, k, v, self.window, prefix, document), None


class NeuralMemoryInShares(NeuralMemory):
    """The convolutions' last inputs come from the process before; the memory's operator has its own way across."""

    context: Context

    def write(
        self,
        x: Tensor,
        state: LayerState,
        begin: LayerState | None,
        starts: Tensor | None,
        clip: StateGradClip | None = None,
    ) -> tuple[Tensor, LayerState]:
        """See NeuralMemory; `state` is what the sequence begins with, on every process."""
        return super().write(x, state, begin, None if starts is None else self.context.share(starts), clip)

    def _before(
        self, inputs: list[Tensor], tails: list[Tensor], starts: Tensor | None, begins: list[Tensor] | None
    ) -> list[Tensor]:
        """The three convolutions' last inputs, in one message."""
        every = zip(self._convs, inputs, tails, begins or repeat(None), strict=False)
        ends = torch.cat([conv.tail(x, past, starts, begin) for conv, x, past, begin in every], -1)
        found = tokens_before(ends, ends.shape[1], self.context).chunk(3, -1)
        if self.context.rank > 0:
            return list(found)
        return [torch.cat([tail, nothing], 1) for tail, nothing in zip(tails, found, strict=True)]


class MemoryAsContextInShares(MemoryAsContext):
    """Whole segments, each with what the one before has left: a wave whose groups are sequences."""

    context: Context
    parallel: ParallelConfig

    def _over_segments(
        self,
        x: Tensor,
        now: SegmentState,
        begin: LayerState | None,
        starts: Tensor | None,
        prefix: Prefix | None,
        clip: StateGradClip | None,
    ) -> tuple[Tensor, SegmentState]:
        """See MemoryAsContext; `now` is what the sequence begins with, on every process. No state is returned."""
        count = context_groups(self.parallel, x.shape[0], 1)
        columns = [x.chunk(count)]
        shared = list(prefix or ())
        if starts is not None:
            assert begin is not None
            columns.append(self.context.share(starts).chunk(count))
            shared += _layer_tensors(begin)
        states = zip(*(part.chunk(count) for part in _segment_tensors(now)), strict=True)
        groups = [Group(list(i), list(s)) for i, s in zip(zip(*columns, strict=True), states, strict=True)]
        of_prefix = len(prefix or ())
        one_process = super()._over_segments

        def cell(
            inputs: list[Tensor], own: list[Tensor], shared: list[Tensor], clip: StateGradClip | None
        ) -> tuple[Tensor, list[Tensor]]:
            if clip is not None:
                clip.is_shared = True  # the state between two segments is clipped too, from the first one on
            here = (shared[0], shared[1]) if prefix is not None else None
            began = None
            if starts is not None and begin is not None:
                began = _layer_like(begin, shared[of_prefix : of_prefix + len(_layer_tensors(begin))])
            begins = inputs[1] if starts is not None else None
            o, after = one_process(inputs[0], _segment_like(now, own), began, begins, here, clip)
            return o, _segment_tensors(after)

        # Its own parameters, which the cell uses where they are, too: their gradients leave the wave with the others.
        shared += [value for name, value in self.named_parameters() if not name.startswith("out.")]
        outputs, _ = wavefront(cell, groups, shared, self.state_grad_clip, self.context)
        return torch.cat(outputs), now


def _layer_tensors(state: LayerState) -> list[Tensor]:
    assert isinstance(state.memory, MemoryState)
    return [*state.tails, *state.memory.weights, *state.memory.momentum]


def _layer_like(like: LayerState, tensors: list[Tensor]) -> LayerState:
    assert isinstance(like.memory, MemoryState)
    layers = len(like.memory.weights)
    return LayerState(tensors[:3], MemoryState(tensors[3 : 3 + layers], tensors[3 + layers :]))


def _segment_tensors(state: SegmentState) -> list[Tensor]:
    """What is handed on between two segments."""
    return [state.tail, *_layer_tensors(state.memory)]


def _segment_like(like: SegmentState, tensors: list[Tensor]) -> SegmentState:
    """The state between two segments of as many rows as `tensors` have."""
    rows = map_tensors(like, lambda x: x[: len(tensors[0])])
    memory = _layer_like(like.memory, tensors[1:])
    assert isinstance(memory.memory, MemoryState)
    return replace(rows, tail=tensors[0], memory=memory, before=memory.memory.weights)
