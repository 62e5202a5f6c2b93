"""Floating-point operations of a token, worked out from sizes; a product of (a, b) and (b, c) has 2 a b c.

Counted are matrix products: those of learned matrices, of attention, and of the memory operator. The basis of the model
FLOPs utilisation (MFU) is what the mathematics asks for, once forward and once backward: attention over the keys that
a query sees, nothing worked out again. What a GPU does is more: masked blocks of windows, and what is recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import ceil

from titans_dist.config import Config, ModelConfig
from titans_dist.config.layout import context_mode
from titans_dist.plan.parameters import learned_gates


@dataclass(frozen=True)
class Flops:
    """Per token, by part."""

    matmul: float
    attention: float
    memory: float

    def total(self) -> float:
        """All of them."""
        return self.matmul + self.attention + self.memory

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.matmul + other.matmul, self.attention + other.attention, self.memory + other.memory)

    def times(self, factor: float) -> Flops:
        """The same, `factor` times."""
        return Flops(self.matmul * factor, self.attention * factor, self.memory * factor)


def forward(config: Config) -> Flops:
    """Of the whole model, once forward: what the mathematics asks for."""
    return _forward(config, is_performed=False)


def backward(config: Config) -> Flops:
    """Once backward: twice the forward pass, but for the memory, through whose inner gradient it goes twice."""
    return _backward(config, forward(config))


def training(config: Config) -> Flops:
    """The basis of the MFU: once forward, once backward."""
    return forward(config) + backward(config)


def performed(config: Config) -> Flops:
    """What is computed in training, masked keys and what is worked out again with it."""
    block, head = performed_by(config)
    return block.times(config.model.num_layers) + head


def performed_by(config: Config) -> tuple[Flops, Flops]:
    """`performed`, of one block and of the head."""
    layers, head = config.model.num_layers, Flops(3 * _head(config.model), 0.0, 0.0)
    one = _forward(config, is_performed=True)
    block = (one + _backward(config, one) + head.times(-1)).times(1 / layers)
    runs = _runs(config)
    # The answers to the unit states, times the state that was before.
    rows = 0 if runs == 1 else 6.0 * (runs - 1) * config.model.head_dim * config.model.hidden_size
    block = Flops(block.matmul, block.attention, block.memory * runs + rows)
    again = Flops((one.matmul - _head(config.model)) / layers, one.attention / layers, one.memory * runs / layers)
    if config.training.recompute == "full":
        return block + again + Flops(0.0, 0.0, again.memory), head
    if config.training.recompute == "selective":
        return block + Flops(0.0, 0.0, again.memory), head
    return block, head


def _runs(config: Config) -> int:
    """How often a memory is run: where shares of a sequence are scanned, from zero and from the unit states."""
    if config.parallel.context == 1 or not config.model.has_memory or context_mode(config) != "scan":
        return 1
    return 2 + config.model.memory.choice("momentum")


def _backward(config: Config, one: Flops) -> Flops:
    memory = config.model.num_layers * _memory_backward(config.model) if config.model.has_memory else 0.0
    return Flops(2 * one.matmul, 2 * one.attention, memory)


def _forward(config: Config, is_performed: bool) -> Flops:
    model, length = config.model, config.data.sequence_length
    keys = _keys(model, length, is_performed)
    attention = 4.0 * model.hidden_size * keys  # scores and their product with the values
    memory = memory_forward(model) if model.has_memory else 0.0
    layers = model.num_layers
    return Flops(layers * 2.0 * _learned(model) + _head(model), layers * attention, layers * memory)


def _head(model: ModelConfig) -> float:
    return 2.0 * model.hidden_size * model.vocab_size


def _learned(model: ModelConfig) -> float:
    """Elements of the matrices that every token goes through in one block, as often as it does."""
    hidden = model.hidden_size
    square, grouped = hidden * hidden, hidden * model.kv_heads * model.head_dim
    mlp = 3 * hidden * model.mlp_size
    attention = square + 2 * grouped
    if not model.has_memory:
        return mlp + attention + square
    memory = 4 * square + (2 if model.memory.is_tnt else 1) * _gates(model)
    if model.variant == "mag":
        return mlp + attention + memory + square
    if model.variant == "mal":
        return mlp + attention + memory + 2 * square
    if model.variant == "mac":
        # A segment asks the memory with queries and a gate of their own; keys and values are those of h and of S.
        return mlp + attention + 2 * grouped + memory + 2 * square + 3 * square
    return mlp + memory + square


def _gates(model: ModelConfig) -> int:
    """Elements of the maps that make a token's gates."""
    memory, hidden = model.memory, model.hidden_size
    per_head = hidden * model.num_heads
    each = 2 * hidden * memory.gate_rank if memory.channel_wise else per_head
    return learned_gates(model) * each + (per_head if memory.choice("bias") == "huber" else 0)


def _keys(model: ModelConfig, length: int, is_performed: bool) -> float:
    """Keys per query: those it sees, on the average; or all that are computed."""
    persistent = model.persistent_tokens
    if model.variant == "mac":
        segment = min(model.segment_length, length)
        return 2 * segment + persistent if is_performed else segment + 1 + persistent
    if model.variant == "transformer":
        window = length
    elif model.variant in ("swa", "mag", "mal"):
        window = min(model.window, length)
    else:
        return 0.0
    if is_performed and window < length:
        return (2 * window + persistent) * ceil(length / window) * window / length
    # The first queries see fewer; kernels for causal attention leave out what nobody sees.
    return window - window * (window - 1) / 2 / length + persistent


# The memory operator, per token of one block: all heads


def layers_of(model: ModelConfig) -> list[tuple[int, int]]:
    """(d_in, d_out) of each layer of one head's memory."""
    dim, choice = model.head_dim, model.memory.choice
    return list(pairwise([dim, *[dim * choice("expansion")] * (choice("depth") - 1), dim]))


def memory_forward(model: ModelConfig) -> float:
    """Writes and reads of a token in the chunked dual form.

    With P weights, of which P' are not in the first layer, m slots (W and, with momentum, S) and chunks of b tokens:
    keys through the layers P, the inner gradient back P', outer products to m slots m P, queries through them m P; and
    inside the chunk b (I + O), for scores and their products of all widths. The delta rule solves a triangle.
    """
    memory = model.memory
    if memory.is_tnt:
        assert memory.global_chunk_size is not None
        matrix = 2 * model.head_dim**2 * 3 + 4 * memory.chunk_size * model.head_dim  # keys' sum of outer products
        whole = _writes(model) + 2 * _weights(model)  # read at the chunk's start: the writes inside are not seen
        return whole + _one_memory(model, memory.chunk_size) + model.num_heads * matrix
    found = _one_memory(model, memory.chunk_size)
    if model.variant == "mac":
        found += 2 * _weights(model)  # what the segment retrieves
    return found


def _one_memory(model: ModelConfig, chunk: int) -> float:
    slots = 2 if model.memory.choice("momentum") else 1
    widths = sum(a + b for a, b in layers_of(model))
    inside = 2.0 * chunk * widths * model.num_heads
    if model.memory.choice("anchor") == "token" and model.memory.choice("bias") != "dot":
        inside += 3.0 * chunk * model.head_dim * model.num_heads
    return _writes(model) + 2.0 * slots * _weights(model) + inside


def _writes(model: ModelConfig) -> float:
    slots = 2 if model.memory.choice("momentum") else 1
    return 2.0 * ((1 + slots) * _weights(model) + _later_weights(model))


def _memory_backward(model: ModelConfig) -> float:
    """From the slots after a chunk 2 m P, through the reads 2 m P, through the inner gradient 2 P + 2 P'; inside the
    chunk two gradients for each product."""
    memory = model.memory
    slots = 2 if memory.choice("momentum") else 1
    widths = sum(a + b for a, b in layers_of(model))
    products = 2.0 * ((4 * slots + 2) * _weights(model) + 2 * _later_weights(model))
    one = products + 4.0 * memory.chunk_size * widths * model.num_heads
    if memory.is_tnt:
        matrix = 2 * model.head_dim**2 * 6 + 8 * memory.chunk_size * model.head_dim
        return one + products + model.num_heads * matrix
    return one + (4.0 * _weights(model) if model.variant == "mac" else 0.0)


def _weights(model: ModelConfig) -> int:
    """P, of all heads."""
    return model.num_heads * sum(a * b for a, b in layers_of(model))


def _later_weights(model: ModelConfig) -> int:
    """P', of all heads."""
    return model.num_heads * sum(a * b for a, b in layers_of(model)[1:])
