"""What each token does to the memory: how much it forgets (alpha), carries on (eta) and writes (theta)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans_dist.config import MemoryConfig, ModelConfig
from titans_dist.layers.parameter import linear, logit, normal
from titans_dist.layers.persistent import Shared
from titans_dist.memory import MemorySpec

# The gates before training, each per token: the share forgotten, the momentum kept, the inner learning rate as a share
# of its largest value (of the delta rules' beta too), and where Huber's loss becomes linear. A memory that forgets a
# hundredth per token shrinks to nothing in front of its LayerNorm within some chunks and becomes chaotic; a thousandth
# also trains better.
ALPHA, ETA, THETA, BETA, DELTA = 0.001, 0.9, 0.1, 0.5, 1.0


@dataclass
class GateValues:
    """Gates (B, T, H), or but for delta (B, T, H, D) where they are channel-wise; None where the memory has none."""

    alpha: Tensor | None
    eta: Tensor | None
    theta: Tensor
    delta: Tensor | None


class GateMap(nn.Module):
    """(B, T, hidden) -> a number per head (B, T, H); per channel (B, T, H, D) through a low rank."""

    plan: ClassVar = {"map": "column"}
    full_width: ClassVar = {"map": "input"}

    def __init__(self, config: ModelConfig, bias: float, channel_wise: bool) -> None:
        super().__init__()
        hidden, rank = config.hidden_size, config.memory.gate_rank
        self.head_dim = config.head_dim if channel_wise else None
        # Between two column-split maps the low rank would be split: it is shared instead.
        self.down = Shared(rank, hidden, init=normal(hidden**-0.5), decay=True) if channel_wise else None
        self.map = linear(*(rank, hidden) if channel_wise else (hidden, config.num_heads), config.init_std, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.map(x if self.down is None else F.linear(x, self.down()))
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        return y if self.head_dim is None else y.unflatten(-1, (-1, self.head_dim))


class Gates(nn.Module):
    """The gates that a memory of `spec`, written in chunks of `chunk_size` tokens, needs."""

    plan: ClassVar = {"constant_alpha": "heads"}
    full_width: ClassVar = {"constant_alpha": "whole"}
    constant_alpha: Tensor | None

    def __init__(self, config: ModelConfig, spec: MemorySpec, chunk_size: int) -> None:
        super().__init__()
        memory, wide = config.memory, spec.channel_wise
        self.channel_wise = wide
        # RetNet forgets at a rate per head that nobody learns: a buffer, made where no parameter is ("meta") too.
        is_constant = memory.preset == "retnet" and spec.retention != "none"
        self.register_buffer(
            "constant_alpha", retnet_alpha(config.num_heads) if is_constant else None, persistent=False
        )
        # A longer chunk forgets as much as one of memory.chunk_size does.
        forgotten = ALPHA * min(1.0, memory.chunk_size / chunk_size)
        has_alpha = spec.retention != "none" and not is_constant
        self.alpha = GateMap(config, logit(forgotten), wide) if has_alpha else None
        self.eta = GateMap(config, logit(ETA), wide) if spec.momentum else None
        rate = BETA if spec.is_delta_rule else THETA
        self.theta = GateMap(config, logit(rate), wide) if spec.bias != "dot" else None
        # softplus(log(e^x - 1)) = x
        self.delta = GateMap(config, math.log(math.expm1(DELTA)), False) if spec.bias == "huber" else None
        self.theta_max = largest_theta(config.memory, spec, chunk_size)

    def forward(self, x: Tensor, k: Tensor) -> GateValues:
        """x: (B, T, hidden); k: (B, T, H, D), the keys, for the shape of what is constant."""
        accumulate = torch.promote_types(x.dtype, torch.float32)
        alpha = None if self.alpha is None else self.alpha(x).sigmoid()
        if self.constant_alpha is not None:
            rates = self.constant_alpha.to(accumulate)
            alpha = rates.unsqueeze(-1).expand_as(k) if self.channel_wise else rates.expand(k.shape[:3])
        if self.theta is None:
            shape = k.shape if self.channel_wise else k.shape[:3]
            theta = torch.full(shape, self.theta_max, dtype=accumulate, device=x.device)
        else:
            theta = self.theta(x).sigmoid() * self.theta_max
        eta = None if self.eta is None else self.eta(x).sigmoid()
        delta = None if self.delta is None else F.softplus(self.delta(x))
        return GateValues(alpha, eta, theta, delta)


def retnet_alpha(heads: int) -> Tensor:
    """The share that each of RetNet's heads forgets per token, (heads,)."""
    return 2.0 ** -(5 + torch.arange(heads, device="cpu", dtype=torch.float32))


def largest_theta(memory: MemoryConfig, spec: MemorySpec, chunk_size: int) -> float:
    """theta's largest value, or its constant one.

    What one chunk of equal keys moves the memory by stays the same for every chunk size; with momentum, which adds up
    1 / (1 - eta) writes, that is one step before training. The linear recurrences have the theta that makes them what
    they are: beta / 2 of the delta rules, 1/2 of the dot losses.
    """
    if spec.is_delta_rule or (spec.bias == "dot" and is_linear_recurrence(spec)):
        return memory.theta_max or 0.5
    per_chunk = memory.theta_max * memory.chunk_size if memory.theta_max else 1.0
    return per_chunk / chunk_size


def is_linear_recurrence(spec: MemorySpec) -> bool:
    """Whether the memory is one matrix whose output is its product with the query."""
    return spec.depth == 1 and not spec.residual and spec.is_linear
