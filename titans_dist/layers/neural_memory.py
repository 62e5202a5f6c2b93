"""The layer around the memory (Titans, section 4.4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from titans_dist.config import ModelConfig
from titans_dist.layers.conv import CausalConv
from titans_dist.layers.inner_memory import InnerMemory
from titans_dist.layers.kernels import by_kernels
from titans_dist.layers.norm import HeadNorm, head_norm
from titans_dist.layers.parameter import linear
from titans_dist.layers.state import expand
from titans_dist.layers.tnt import TNTMemory, TNTState
from titans_dist.memory import MemoryState
from titans_dist.memory.compiled import compiled
from titans_dist.memory.grad_clip import StateGradClip


@dataclass
class LayerState:
    """The last inputs of the convolutions over q, k, v (B, kernel - 1, hidden), and the memory."""

    tails: list[Tensor]
    memory: MemoryState | TNTState


class NeuralMemory(nn.Module):
    """(B, T, hidden) -> (B, T, H, D): projections, causal conv, SiLU, memory, per-head norm, output gate.

    The memory starts from learned weights and has read the persistent tokens before the first token, as one chunk
    of its own: those tokens do not depend on the sequence, so this is done once for the whole batch.
    """

    plan: ClassVar = {name: "column" for name in ("q", "k", "v", "gate")}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, heads, dim, memory = config.hidden_size, config.num_heads, config.head_dim, config.memory
        self.head_dim = dim
        self.q = linear(hidden, hidden, config.init_std)
        self.k = linear(hidden, hidden, config.init_std)
        self.v = linear(hidden, hidden, config.init_std)
        self.q_conv = CausalConv(hidden, config.conv_kernel)
        self.k_conv = CausalConv(hidden, config.conv_kernel)
        self.v_conv = CausalConv(hidden, config.conv_kernel)
        self.memory = TNTMemory(config) if memory.is_tnt else InnerMemory(config, memory.chunk_size, memory.read)
        self.norm = HeadNorm(heads, dim, config.norm_eps)
        self.gate = linear(hidden, hidden, config.init_std)
        self.backend = memory.backend
        is_compiled = memory.backend == "compiled"
        self._unit: Callable[..., Tensor] = compiled(_unit) if is_compiled else _unit
        self._finish: Callable[..., Tensor] = compiled(_normed_and_gated) if is_compiled else _normed_and_gated

    def forward(
        self, x: Tensor, persistent: Tensor | None, state: LayerState | None = None, starts: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        """`persistent` (1, P, hidden) is written into the memory before the first token of every document.

        state: what an earlier call returned; starts (B, T): tokens that begin a document. Returns also the state after.
        """
        begin = self.begin(persistent)[1] if state is None or starts is not None else None
        now = begin if state is None else state
        assert now is not None
        return self.write(x, now, begin, starts)

    def write(
        self,
        x: Tensor,
        state: LayerState,
        begin: LayerState | None,
        starts: Tensor | None,
        clip: StateGradClip | None = None,
    ) -> tuple[Tensor, LayerState]:
        """`forward` from a state (B or 1 rows); documents at `starts` begin with `begin`, what `begin()` returns.

        clip: the one that all calls on a sequence share.
        """
        batch = x.shape[0]
        state = expand(state, batch)
        inputs, begins = self._inputs(x), None if begin is None else begin.tails
        tails = self._before(inputs, state.tails, starts, begins)
        q, k, v, tails = self._project(inputs, tails, starts, begins)
        start = None if begin is None or starts is None else expand(begin.memory, batch)
        y, memory = self.memory(x, q, k, v, state.memory, start, starts, clip)
        return self._gated(x, y), LayerState(tails, memory)

    def begin(self, persistent: Tensor | None) -> tuple[Tensor | None, LayerState]:
        """What a sequence begins with (one row): the outputs at the persistent tokens (1, P, hidden), and the state."""
        tails = [conv.no_past() for conv in self._convs]
        if persistent is None:
            return None, LayerState(tails, self.memory.learned_state(1))
        q, k, v, tails = self._project(self._inputs(persistent), tails, None, None)
        y, memory = self.memory.read_persistent(persistent, q, k, v)
        return self._gated(persistent, y), LayerState(tails, memory)

    def query(self, x: Tensor, tail: Tensor, starts: Tensor | None, begin: Tensor | None) -> tuple[Tensor, Tensor]:
        """The queries of `x` alone, (B, T, H, D), and their convolution's tail."""
        return self._mixed(self.q_conv, self.q(x), tail, starts, begin, True)

    def retrieve(self, x: Tensor, q: Tensor, weights: list[Tensor]) -> Tensor:
        """What a memory that nothing is written to holds about `x` and its queries: (B, T, H, D)."""
        assert isinstance(self.memory, InnerMemory)
        return self._gated(x, self.memory.retrieve(q, weights))

    def _inputs(self, x: Tensor) -> list[Tensor]:
        """What the three convolutions read, (B, T, H D) each."""
        return [self.q(x), self.k(x), self.v(x)]

    def _before(
        self, inputs: list[Tensor], tails: list[Tensor], starts: Tensor | None, begins: list[Tensor] | None
    ) -> list[Tensor]:
        """What lies before `inputs`: what the state says."""
        return tails

    def _project(
        self, inputs: list[Tensor], tails: list[Tensor], starts: Tensor | None, begins: list[Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        (q, q_tail), (k, k_tail), (v, v_tail) = (
            self._mixed(conv, x, tail, starts, begin, unit=conv is not self.v_conv)
            for conv, x, tail, begin in zip(self._convs, inputs, tails, begins or repeat(None), strict=False)
        )
        return q, k, v, [q_tail, k_tail, v_tail]

    def _mixed(
        self, conv: CausalConv, x: Tensor, tail: Tensor, starts: Tensor | None, begin: Tensor | None, unit: bool
    ) -> tuple[Tensor, Tensor]:
        """SiLU of the convolution, (B, T, H, D), every head at length 1 if `unit`; and what the next token has before.

        `tail` and `begin` as in `CausalConv`.
        """
        if self._by_kernels(x):
            from titans_kernels.short_conv import short_conv

            begin = None if starts is None else begin
            y = short_conv(x, tail, conv.weight, self.head_dim, unit, starts, begin)
            return y, conv.tail(x, tail, starts, begin)
        y, tail = conv(x, tail, starts, begin)
        y = self._heads(y)
        return self._unit(y) if unit else F.silu(y), tail

    @property
    def _convs(self) -> list[CausalConv]:
        return [self.q_conv, self.k_conv, self.v_conv]

    def _gated(self, x: Tensor, y: Tensor) -> Tensor:
        if self._by_kernels(y):
            from titans_kernels.norm_gate import norm_gate

            return norm_gate(y, self._heads(self.gate(x)), self.norm.weight, self.norm.eps)
        return self._finish(y, self._heads(self.gate(x)), self.norm.weight, self.norm.eps)

    def _by_kernels(self, x: Tensor) -> bool:
        return by_kernels(self.backend, x, self.head_dim, self.q_conv.weight.shape[1])

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


def _unit(x: Tensor) -> Tensor:
    """SiLU, then every head (B, T, H, D) at length 1."""
    return F.normalize(F.silu(x), dim=-1)


def _normed_and_gated(y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of every head, times SiLU of the gate."""
    return head_norm(y, weight, eps) * F.silu(gate)
