"""Every parameter of a part of the model by itself: its size, and whether tensor parallelism splits it.

`titans_dist.config.sizes` has their sums. Buckets of gradients are padded per parameter, so they need the single ones.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from titans_dist.config import ModelConfig


class ParameterSize(NamedTuple):
    """The elements of one parameter in the whole model."""

    numel: int
    is_split: bool
    """Whether every tensor-parallel process holds a part of it; else each holds it whole, and its gradients are summed
    over them."""

    def on_one(self, tensor: int) -> int:
        """Elements that one of `tensor` processes holds."""
        return self.numel // tensor if self.is_split else self.numel


def part_parameters(model: ModelConfig, blocks: int, is_first: bool, is_last: bool) -> list[ParameterSize]:
    """Those of a part of the model, in the order in which torch names them; a tied weight is there once."""
    hidden = model.hidden_size
    vocabulary = [_split(model.vocab_size * hidden)]
    head = [_whole(hidden), *([] if model.tie_embeddings and is_first else vocabulary)]
    return [*(vocabulary if is_first else []), *(blocks * block_parameters(model)), *(head if is_last else [])]


def block_parameters(model: ModelConfig) -> list[ParameterSize]:
    """Those of one block."""
    norm = _whole(model.hidden_size)
    return [norm, *_mixer(model), norm, *[_split(model.hidden_size * model.mlp_size)] * 3]


def _mixer(model: ModelConfig) -> list[ParameterSize]:
    hidden = model.hidden_size
    square, head_norm, norm = _split(hidden * hidden), _split(hidden), _whole(hidden)
    persistent = [_whole(model.persistent_tokens * hidden)] if model.persistent_tokens else []
    grouped = _split(hidden * model.kv_heads * model.head_dim)
    attention = [square, grouped, grouped]
    if not model.has_memory:
        return [*persistent, *attention, square]
    memory = _neural_memory(model)
    if model.variant == "mag":
        return [*persistent, *attention, *memory, head_norm, head_norm, square]
    if model.variant == "mal":
        return [*persistent, *memory, square, norm, *attention, square]
    if model.variant == "mac":
        return [*persistent, *memory, square, norm, *attention, square, norm, head_norm, head_norm, square]
    return [*persistent, *memory, square]


def _neural_memory(model: ModelConfig) -> list[ParameterSize]:
    hidden = model.hidden_size
    square, convolution = _split(hidden * hidden), _split(hidden * model.conv_kernel)
    inner = (2 if model.memory.is_tnt else 1) * _inner_memory(model)
    return [square, square, square, convolution, convolution, convolution, *inner, _split(hidden), square]


def _inner_memory(model: ModelConfig) -> list[ParameterSize]:
    memory, hidden, heads = model.memory, model.hidden_size, model.num_heads
    dim, depth = model.head_dim, memory.choice("depth")
    widths = [dim, *[dim * memory.choice("expansion")] * (depth - 1), dim]
    weights = [_split(heads * a * b) for a, b in pairwise(widths)]
    layer_norm = [_split(hidden)] * 2 if memory.choice("residual") else []
    gate = [_split(hidden * heads), _split(heads)]
    wide = [_whole(memory.gate_rank * hidden), _split(memory.gate_rank * hidden), _split(hidden)]
    delta = gate if memory.choice("bias") == "huber" else []
    return [*layer_norm, *weights, *(learned_gates(model) * (wide if memory.channel_wise else gate)), *delta]


def learned_gates(model: ModelConfig) -> int:
    """How many of alpha, eta and theta are maps of the token; the others are not there, or constant."""
    memory = model.memory
    alpha = memory.choice("retention") != "none" and memory.preset != "retnet"
    return sum((alpha, memory.choice("momentum"), memory.choice("bias") != "dot"))


def _split(numel: int) -> ParameterSize:
    return ParameterSize(numel, True)


def _whole(numel: int) -> ParameterSize:
    return ParameterSize(numel, False)
