"""Memory as context (Titans, eqs 21-25), causal.

Segments of C tokens, one after the other. In each, S are the segment's tokens and

    h = f(q(S))              what the memory, as it was before the segment, holds about them
    y = attention(P, h, S)   token i sees the persistent tokens P, and of h and S those up to i
    m_i = f_{M_i}(q(y_i))    y is written into the memory; token i reads it after its own write
    o = silu(w1 norm(y)) * (w2 norm(m))

Neither h_j nor S_j with j > i, nor what the memory learns later, reaches token i.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans_dist.config import ModelConfig
from titans_dist.layers.attention import Attention, Prefix, masked_attention
from titans_dist.layers.neural_memory import LayerState, NeuralMemory
from titans_dist.layers.norm import HeadNorm, RMSNorm
from titans_dist.layers.parameter import linear
from titans_dist.layers.persistent import persistent_memory
from titans_dist.layers.state import expand
from titans_dist.memory import MemoryState
from titans_dist.memory.grad_clip import StateGradClip

# Nothing but y reaches the memory, and attention that has learned nothing yet is a mean: all tokens of a segment would
# write nearly the same pair over each other. So a token begins by attending to itself.
SELF_LOGIT = 20.0


@dataclass
class SegmentState:
    """The running segment, of which `position` tokens are done, and the memory.

    tail: the last inputs of the convolution over the retrieval's queries; memory: with what y has written;
    before: the memory the segment (or the document that began in it) found, one (B, H, d_in, d_out) per layer.
    keys, values: those of h and those of S, (B, C, H, D), zero after `position`; running (B, C): of the document that
    is still running.
    """

    tail: Tensor
    memory: LayerState
    before: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    running: Tensor
    position: int


class MemoryAsContext(nn.Module):
    """(B, T, hidden) -> the same shape."""

    plan: ClassVar = {
        "memory_out": "row",
        "context_norm": "norm",
        "attention_out": "row",
        "attention_norm": "norm",
        "out": "row",
    }

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, heads, dim = config.hidden_size, config.num_heads, config.head_dim
        self.segment_length, self.state_grad_clip = config.segment_length, config.memory.state_grad_clip
        self.persistent = persistent_memory(config)
        self.memory = NeuralMemory(config)
        self.memory_out = linear(hidden, hidden, config.init_std)
        self.context_norm = RMSNorm(hidden, config.norm_eps)
        self.attention = Attention(config, None, SELF_LOGIT)
        self.attention_out = linear(hidden, hidden, config.init_std)
        self.attention_norm = RMSNorm(hidden, config.norm_eps)
        self.y_norm = HeadNorm(heads, dim, config.norm_eps)
        self.m_norm = HeadNorm(heads, dim, config.norm_eps)
        self.out = linear(hidden, hidden, config.residual_std)

    def forward(
        self, x: Tensor, state: SegmentState | None = None, starts: Tensor | None = None
    ) -> tuple[Tensor, SegmentState | None]:
        """See `mixers`."""
        persistent = None if self.persistent is None else self.persistent()
        begin = self.memory.begin(persistent)[1] if state is None or starts is not None else None
        now = self._begin(begin, x.shape[0]) if state is None else state
        prefix = self.attention.prefix(persistent)
        clip = None if self.state_grad_clip is None else StateGradClip(self.state_grad_clip, is_shared=True)
        o, now = self._over_segments(x, now, begin, starts, prefix, clip)
        o = o if clip is None else clip.results(o)[0]
        return self.out(o.flatten(2)), None if state is None else now

    def _over_segments(
        self,
        x: Tensor,
        now: SegmentState,
        begin: LayerState | None,
        starts: Tensor | None,
        prefix: Prefix | None,
        clip: StateGradClip | None,
    ) -> tuple[Tensor, SegmentState]:
        """Tokens (B, T, hidden) -> o (B, T, H, D), before the output projection, segment by segment."""
        outputs = []
        first = 0
        while first < x.shape[1]:
            last = min(x.shape[1], first + self.segment_length - now.position)
            part = None if starts is None else starts[:, first:last]
            o, now = self._segment(x[:, first:last], now, begin, part, prefix, clip)
            outputs.append(o)
            first = last
        return torch.cat(outputs, 1), now

    def initial_state(self, batch: int) -> SegmentState:
        """The state before the first token."""
        return self._begin(self.memory.begin(None if self.persistent is None else self.persistent())[1], batch)

    def _begin(self, begin: LayerState | None, batch: int) -> SegmentState:
        assert begin is not None
        memory, tail = expand(begin, batch), begin.tails[0]
        shape = (batch, self.segment_length, tail.shape[-1] // self.attention.head_dim, self.attention.head_dim)
        empty = [tail.new_zeros(shape) for _ in range(2)]
        running = torch.zeros(shape[:2], dtype=torch.bool, device=tail.device)
        return SegmentState(memory.tails[0], memory, _weights(memory), empty, empty, running, 0)

    def _segment(
        self,
        x: Tensor,
        state: SegmentState,
        begin: LayerState | None,
        starts: Tensor | None,
        prefix: Prefix | None,
        clip: StateGradClip | None,
    ) -> tuple[Tensor, SegmentState]:
        """Tokens of one segment (B, n, hidden) -> o (B, n, H, D), before the output projection, and the state after."""
        position, end = state.position, state.position + x.shape[1]
        document = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device) if starts is None else starts.cumsum(1)

        q, tail = self.memory.query(x, state.tail, starts, None if begin is None else begin.tails[0])
        retrieved, before = self.memory.retrieve(x, q, state.before), state.before
        if starts is not None:
            assert begin is not None
            fresh = self.memory.retrieve(x, q, _weights(begin))
            retrieved = torch.where((document > 0)[..., None, None], fresh, retrieved)
            restarted = (document[:, -1] > 0)[:, None, None, None]
            before = [torch.where(restarted, b, w) for b, w in zip(_weights(begin), before, strict=True)]
        h = self.context_norm(self.memory_out(retrieved.flatten(2)))

        index = torch.arange(end, device=x.device)
        place = index[None, position:]  # in the segment, the same for a token of S and its h
        new = zip(*(self.attention.keys_values(part, place) for part in (h, x)), strict=True)
        keys, values = (
            [torch.cat([old[:, :position], own], 1) for old, own in zip(past, parts, strict=True)]
            for past, parts in zip((state.keys, state.values), new, strict=True)
        )
        seen = torch.cat([state.running[:, :position].to(document.dtype) - 1, document], 1)
        visible = (index <= index[position:, None]) & (seen[:, None] == document[..., None])
        queries = self.attention.queries(x, place)
        y = masked_attention(queries, torch.cat(keys, 1), torch.cat(values, 1), visible.repeat(1, 1, 2), prefix)

        written = self.attention_norm(self.attention_out(y.flatten(2)))
        m, memory = self.memory.write(written, state.memory, begin, starts, clip)
        o = F.silu(self.y_norm(y)) * self.m_norm(m)

        if end == self.segment_length:
            empty = [torch.zeros_like(x) for x in state.keys]
            return o, SegmentState(tail, memory, _weights(memory), empty, empty, torch.zeros_like(state.running), 0)
        rest = self.segment_length - end
        keys = [F.pad(x, (0, 0, 0, 0, 0, rest)) for x in keys]
        values = [F.pad(x, (0, 0, 0, 0, 0, rest)) for x in values]
        running = F.pad(seen == document[:, -1:], (0, rest))
        return o, SegmentState(tail, memory, before, keys, values, running, end)


def _weights(state: LayerState) -> list[Tensor]:
    assert isinstance(state.memory, MemoryState)
    return state.memory.weights
