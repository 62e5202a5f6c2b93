"""How many parameters a model has, in closed form: known before torch is imported.

It says once more what the layers say. A test counts the layers' parameters and compares.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from titans_dist.config.model import MemoryConfig, ModelConfig

STEP = 64
"""The MLP's width is a multiple of this where a budget decides it."""


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the model of `config`."""
    return _without_mlp(config) + config.mlp_size * _per_width(config)


def mlp_size_for(config: ModelConfig, parameters: int) -> int:
    """Width of the MLP, a multiple of STEP, that brings the model nearest to `parameters`."""
    rest = parameters - _without_mlp(config)
    return max(1, round(rest / (STEP * _per_width(config)))) * STEP


def smallest(config: ModelConfig) -> int:
    """Parameters of the model with the narrowest MLP that a budget can ask for."""
    return _without_mlp(config) + STEP * _per_width(config)


def _per_width(config: ModelConfig) -> int:
    return 3 * config.hidden_size * config.num_layers


def _without_mlp(config: ModelConfig) -> int:
    hidden = config.hidden_size
    embedding = config.vocab_size * hidden * (1 if config.tie_embeddings else 2)
    return embedding + hidden + config.num_layers * (2 * hidden + mixer(config))


def mixer(config: ModelConfig) -> int:
    """Parameters of one block's mixer over time."""
    hidden = config.hidden_size
    square, norm = hidden * hidden, hidden
    persistent = config.persistent_tokens * hidden
    attention = square + 2 * hidden * config.kv_heads * config.head_dim + persistent
    if not config.has_memory:
        return attention + square
    memory = neural_memory(config)
    return {
        "mag": attention + memory + 2 * norm + square,
        "mal": memory + square + norm + attention + square,
        "mac": memory + attention + 2 * (square + norm) + 2 * norm + square,
    }.get(config.variant, memory + persistent + square)


def neural_memory(config: ModelConfig) -> int:
    """Parameters of one NeuralMemory: projections, convolutions, the memory (TNT has two), the norm after it."""
    hidden = config.hidden_size
    inner = inner_memory(config) * (2 if config.memory.is_tnt else 1)
    return 4 * hidden * hidden + 3 * hidden * config.conv_kernel + inner + hidden


def inner_memory(config: ModelConfig) -> int:
    """Parameters of one InnerMemory: the weights it starts with, the LayerNorm inside it, and its gates."""
    memory = config.memory
    layer_norm = 2 * config.hidden_size if memory.choice("residual") else 0
    return config.num_heads * memory_weights(memory, config.head_dim) + layer_norm + gates(config)


def gates(config: ModelConfig) -> int:
    """Parameters of the maps that make a token's gates. RetNet's forgetting and a dot loss's step are constants."""
    hidden, heads, memory = config.hidden_size, config.num_heads, config.memory
    per_head = hidden * heads + heads
    per_channel = memory.gate_rank * 2 * hidden + hidden
    alpha = memory.choice("retention") != "none" and memory.preset != "retnet"
    count = sum((alpha, memory.choice("momentum"), memory.choice("bias") != "dot"))
    delta = per_head if memory.choice("bias") == "huber" else 0
    return count * (per_channel if memory.channel_wise else per_head) + delta


def memory_weights(memory: MemoryConfig, head_dim: int) -> int:
    """Weights of one head's memory."""
    widths = [head_dim] + [head_dim * memory.choice("expansion")] * (memory.choice("depth") - 1) + [head_dim]
    return sum(a * b for a, b in pairwise(widths))
