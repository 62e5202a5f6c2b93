"""The layer around the memory operator (Titans, section 4.4)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from titans_dist.config import ModelConfig
from titans_dist.layers.conv import CausalConv
from titans_dist.layers.norm import HeadNorm
from titans_dist.layers.parameter import constant, linear, logit, normal, parameter
from titans_dist.memory import MemorySpec, MemoryState, neural_memory

# The gates before training, each per token: the share forgotten, the momentum kept, and the inner learning rate as a
# share of theta_max.
ALPHA, ETA, THETA = 0.01, 0.9, 0.1


class NeuralMemory(nn.Module):
    """(B, T, hidden) -> (B, T, H, D): projections, causal conv, SiLU, memory, per-head norm, output gate.

    The memory starts from learned weights and has read the persistent tokens before the first token, as one chunk
    of its own: those tokens do not depend on the sequence, so this is done once for the whole batch.
    """

    plan: ClassVar = {
        **{name: "column" for name in ("q", "k", "v", "alpha", "eta", "theta", "gate")},
        **{name: "heads" for name in ("weights", "gain", "bias")},
    }

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, heads, dim, memory = config.hidden_size, config.num_heads, config.head_dim, config.memory
        self.spec = MemorySpec(memory.depth, memory.expansion, memory.activation, memory.residual, memory.momentum)
        self.head_dim, self.chunk_size, self.read = dim, memory.chunk_size, memory.read
        self.theta_max = memory.theta_max or (1 - ETA if memory.momentum else 1.0) / memory.chunk_size
        self.q = linear(hidden, hidden, config.init_std)
        self.k = linear(hidden, hidden, config.init_std)
        self.v = linear(hidden, hidden, config.init_std)
        self.q_conv = CausalConv(hidden, config.conv_kernel)
        self.k_conv = CausalConv(hidden, config.conv_kernel)
        self.v_conv = CausalConv(hidden, config.conv_kernel)
        self.alpha = linear(hidden, heads, config.init_std, bias=logit(ALPHA))
        self.eta = linear(hidden, heads, config.init_std, bias=logit(ETA)) if memory.momentum else None
        self.theta = linear(hidden, heads, config.init_std, bias=logit(THETA))
        shapes = self.spec.shapes(dim)
        self.weights = nn.ParameterList(
            parameter(heads, d_in, d_out, init=normal(std), decay=True)
            for (d_in, d_out), std in zip(shapes, self.spec.initial_std(dim), strict=True)
        )
        if memory.residual:
            self.gain = parameter(heads, dim, init=constant(1.0))
            self.bias = parameter(heads, dim, init=constant(0.0))
        self.norm = HeadNorm(heads, dim, config.norm_eps)
        self.gate = linear(hidden, hidden, config.init_std)

    def forward(self, x: Tensor, persistent: Tensor | None) -> Tensor:
        """`persistent` (1, P, hidden) is written into the memory before the first token of `x`."""
        state, past = None, None
        if persistent is not None:
            past = (self.q(persistent), self.k(persistent), self.v(persistent))
            _, state = self._remember(persistent, past, None, None, persistent.shape[1])
            state = MemoryState(*([t.expand(x.shape[0], *t.shape[1:]) for t in ts] for ts in _parts(state)))
        y, _ = self._remember(x, (self.q(x), self.k(x), self.v(x)), past, state, self.chunk_size)
        return self.norm(y) * F.silu(self._heads(self.gate(x)))

    def _remember(
        self,
        x: Tensor,
        projected: tuple[Tensor, Tensor, Tensor],
        past: tuple[Tensor, Tensor, Tensor] | None,
        state: MemoryState | None,
        chunk_size: int,
    ) -> tuple[Tensor, MemoryState]:
        convs = (self.q_conv, self.k_conv, self.v_conv)
        q, k, v = (
            self._heads(F.silu(conv(part, before)))
            for conv, part, before in zip(convs, projected, past or (None,) * 3, strict=True)
        )
        return neural_memory(
            F.normalize(q, dim=-1),
            F.normalize(k, dim=-1),
            v,
            spec=self.spec,
            weights=list(self.weights),
            alpha=self.alpha(x).sigmoid(),
            eta=None if self.eta is None else self.eta(x).sigmoid(),
            theta=self.theta(x).sigmoid() * self.theta_max,
            norm=(self.gain, self.bias) if self.spec.residual else None,
            state=state,
            chunk_size=chunk_size,
            read=self.read,
        )

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


def _parts(state: MemoryState) -> tuple[list[Tensor], list[Tensor]]:
    return state.weights, state.momentum
