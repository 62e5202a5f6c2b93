"""Checks of the model alone: those every layout and every command needs."""

from __future__ import annotations

from titans_dist.config import sizes
from titans_dist.config.checks import at_least, between, nearest_divisor, nearest_multiple, one_of, positive
from titans_dist.config.errors import ConfigError
from titans_dist.config.model import RECURRENT_VARIANTS, VARIANTS, MemoryConfig, ModelConfig
from titans_dist.config.presets import PRESETS

ACTIVATIONS = ("gelu", "silu", "relu", "identity")
BIASES = ("l2", "dot", "l1", "lp", "huber")
RETENTIONS = ("none", "l2", "lq", "lq_paper", "kl", "elastic_net")
ANCHORS = ("chunk", "token")
READS = ("after", "before")


def validate_model(model: ModelConfig) -> None:
    """Raise ConfigError, one sentence with the mend, for a model that cannot be built on any layout."""
    one_of("model.variant", model.variant, VARIANTS)
    for key in ("num_layers", "hidden_size", "num_heads", "window", "segment_length", "conv_kernel"):
        at_least(f"model.{key}", getattr(model, key), 1)
    at_least("model.vocab_size", model.vocab_size, 2)
    at_least("model.persistent_tokens", model.persistent_tokens, 0)
    for key in ("rope_theta", "norm_eps", "init_std"):
        positive(f"model.{key}", getattr(model, key))
    for key in ("intermediate_size", "parameters", "num_kv_heads"):
        if getattr(model, key) is not None:
            at_least(f"model.{key}", getattr(model, key), 1)
    if model.hidden_size % model.num_heads or model.head_dim % 2:
        step = 2 * model.num_heads
        raise ConfigError(
            f"model.hidden_size={model.hidden_size} does not give {model.num_heads} heads of an even width; "
            f"use a multiple of {step}, such as {nearest_multiple(model.hidden_size, step)}, or change model.num_heads"
        )
    _kv_heads(model)
    _memory_values(model.memory)
    if model.has_memory:
        _memory_choices(model.memory)
        _memory_in_the_model(model)
    if model.intermediate_size is None and model.parameters is not None and model.parameters < sizes.smallest(model):
        raise ConfigError(
            f"model.parameters={model.parameters} is less than this model has with an MLP of width {sizes.STEP}; "
            f"use {sizes.smallest(model)} or more, or fewer or narrower layers"
        )


def _kv_heads(model: ModelConfig) -> None:
    if model.num_heads % model.kv_heads:
        raise ConfigError(
            f"model.num_kv_heads={model.num_kv_heads} does not divide model.num_heads={model.num_heads}; "
            f"the nearest that does is {nearest_divisor(model.num_heads, model.kv_heads)}"
        )
    if model.variant == "mac" and model.kv_heads != model.num_heads:
        raise ConfigError(
            f"model.num_kv_heads={model.num_kv_heads} is not possible with model.variant=mac, whose queries and keys "
            "begin equal, head by head; leave it out or use another variant"
        )


def _memory_values(memory: MemoryConfig) -> None:
    """Each field by itself; None is the preset's value."""
    key = "model.memory."
    assert memory.preset is not None
    one_of(key + "preset", memory.preset, tuple(PRESETS))
    one_of(key + "read", memory.read, READS)
    for name, allowed in (
        ("activation", ACTIVATIONS),
        ("bias", BIASES),
        ("retention", RETENTIONS),
        ("anchor", ANCHORS),
    ):
        if getattr(memory, name) is not None:
            one_of(key + name, getattr(memory, name), allowed)
    one_of(key + "backend", memory.backend, ("auto", "triton", "torch", "compiled"))
    if memory.depth is not None:
        between(key + "depth", memory.depth, 1, 4)
    for name, low in (("expansion", 1), ("p", 1), ("q", 2), ("threshold", 0), ("global_chunk_size", 1)):
        if getattr(memory, name) is not None:
            at_least(key + name, getattr(memory, name), low)
    for name in ("chunk_size", "shard_size", "gate_rank"):
        at_least(key + name, getattr(memory, name), 1)
    for name in ("theta_max", "state_grad_clip"):
        if getattr(memory, name) is not None:
            positive(key + name, getattr(memory, name))


def _memory_choices(memory: MemoryConfig) -> None:
    """Fields of the memory that do not go together."""
    anchor, retention, depth = memory.choice("anchor"), memory.choice("retention"), memory.choice("depth")
    if anchor == "chunk" and (memory.choice("decay") == "before" or memory.choice("implicit")):
        raise ConfigError(
            f"model.memory.anchor=chunk is not possible with model.memory.preset={memory.preset}, which is defined by "
            "gradients at each token's own memory; leave the anchor out or choose another preset"
        )
    if memory.choice("implicit") and not _is_plain_matrix(memory):
        raise ConfigError(
            f"model.memory.preset={memory.preset} is defined for depth=1, bias=l2, residual=false and momentum=false; "
            "leave those out or choose another preset"
        )
    if anchor == "token" and retention not in ("none", "l2"):
        raise ConfigError(
            f"model.memory.retention={retention} needs model.memory.anchor=chunk; use that, or retention=none or l2"
        )
    parallel = depth == 1 and not memory.choice("residual") and not memory.choice("momentum")
    if anchor == "token" and memory.chunk_size > 1 and not (parallel and memory.choice("bias") in ("l2", "dot")):
        raise ConfigError(
            f"model.memory.chunk_size={memory.chunk_size} is not possible with model.memory.anchor=token unless the "
            "memory has depth=1, residual=false, momentum=false and bias=l2 or dot; use chunk_size=1 or anchor=chunk"
        )
    for name, value, possible in (
        ("depth", depth, (1, 2)),
        ("retention", retention, ("none", "l2")),
        ("anchor", anchor, ("chunk",)),
    ):
        if memory.channel_wise and value not in possible:
            raise ConfigError(
                f"model.memory.{name}={value} is not possible with model.memory.channel_wise=true; "
                f"use {name}={' or '.join(map(str, possible))}, or channel_wise=false"
            )


def _is_plain_matrix(memory: MemoryConfig) -> bool:
    plain = memory.choice("depth") == 1 and memory.choice("bias") == "l2"
    return plain and not memory.choice("residual") and not memory.choice("momentum")


def _memory_in_the_model(model: ModelConfig) -> None:
    memory, variant = model.memory, model.variant
    if variant in RECURRENT_VARIANTS and memory.preset != variant:
        raise ConfigError(
            f"model.variant={variant} has the memory of its name, not model.memory.preset={memory.preset}; "
            f"use model.memory.preset={variant}, or variant=lmm with the memory you want"
        )
    if variant == "mac":
        _whole_chunks("model.segment_length", model.segment_length, memory.chunk_size)
    if memory.global_chunk_size is not None:
        if variant != "lmm":
            raise ConfigError(
                f"model.memory.global_chunk_size={memory.global_chunk_size} (TNT) is not possible with "
                f"model.variant={variant}; use variant=lmm, or another memory"
            )
        _whole_chunks("model.memory.global_chunk_size", memory.global_chunk_size, memory.chunk_size)
        _whole_chunks("model.memory.shard_size", memory.shard_size, memory.chunk_size)


def _whole_chunks(key: str, value: int, chunk_size: int) -> None:
    if value % chunk_size:
        raise ConfigError(
            f"{key}={value} is no multiple of model.memory.chunk_size={chunk_size}; "
            f"the nearest is {nearest_multiple(value, chunk_size)}"
        )
