"""What the model is: sizes of the network and of its neural memory."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from titans_dist.config import sizes
from titans_dist.config.errors import ConfigError
from titans_dist.config.presets import PRESETS

ATTENTION_VARIANTS = ("transformer", "swa")
"""Variants without a memory: full attention, and a sliding window alone."""
RECURRENT_VARIANTS = ("mamba2", "deltanet", "gated_deltanet")
"""Variants that are an lmm with the memory preset of their name."""
VARIANTS = ("lmm", "mac", "mag", "mal", *ATTENTION_VARIANTS, *RECURRENT_VARIANTS)

# What a preset that does not say has, as in MemorySpec.
_UNSAID = {"expansion": 4, "anchor": "chunk", "decay": "after", "implicit": False}
_CHOICES = (
    *("depth", "expansion", "activation", "residual", "bias", "retention", "momentum", "anchor"),
    *("p", "q", "threshold"),
)


@dataclass
class MemoryConfig:
    """The neural memory of one layer, one per head: a named memory (`preset`), and what is to differ from it."""

    preset: str | None = None
    """Named memory, such as titans, moneta or ttt_mlp. Unset: titans, or the variant's own (gated_deltanet, ...)."""
    depth: int | None = None
    """Layers of the memory MLP, 1 to 4; depth 1 is a matrix. Unset, here and below: the preset's."""
    expansion: int | None = None
    """Width of the memory's hidden layers as a multiple of the head dimension, >= 1."""
    activation: str | None = None
    """Non-linearity between the memory's layers: gelu, silu, relu or identity."""
    residual: bool | None = None
    """Whether the memory is x + LayerNorm(MLP(x)) (MIRAS) instead of the plain MLP."""
    bias: str | None = None
    """Attentional bias, the inner loss: l2, dot, l1, lp or huber."""
    retention: str | None = None
    """How the past is kept: none, l2 (forgetting), lq, lq_paper, kl or elastic_net."""
    momentum: bool | None = None
    """Whether writes carry momentum (the past surprise of Titans, eq 10)."""
    anchor: str | None = None
    """Where a token's gradient is taken: at the memory its chunk began with (chunk) or at its own (token)."""
    p: float | None = None
    """Power of bias=lp, >= 1."""
    q: float | None = None
    """Norm of retention=lq and lq_paper, >= 2."""
    threshold: float | None = None
    """What retention=elastic_net takes from every weight per token, >= 0."""
    channel_wise: bool = False
    """Whether gates forget, keep and learn per channel of the head instead of per head."""
    gate_rank: int = 32
    """Rank of the maps that make channel-wise gates, >= 1."""
    chunk_size: int = 64
    """Tokens whose gradients are taken at the same memory, >= 1. Part of the model, not a tuning knob."""
    read: str = "after"
    """Whether a token reads the memory after its own write (after) or before it (before)."""
    theta_max: float | None = None
    """Largest inner learning rate, > 0. Unset: 1 / chunk_size, so that a chunk of equal keys moves the memory by about
    one step; for the linear recurrences the one that makes them what they are, 1/2."""
    state_grad_clip: float | None = 1000.0
    """Largest norm, per sequence and head, of the gradient that the memory sends back from one group of chunks to the
    one before, as a multiple of that at its outputs, > 0: over long sequences it can explode although all outputs are
    sound. Ratios of 3 to 400 are usual. null: exact."""
    backend: str = "auto"
    """How it is computed. auto: Triton kernels on NVIDIA GPUs, also for the layer around it, and torch elsewhere and
    for what has none; triton: the kernels, or an error; torch; compiled, the same through torch.compile: faster on
    CPUs, after up to a minute of compiling for each shape; on CPUs that takes a C++ compiler."""
    global_chunk_size: int | None = None
    """Chunk of the global memory of TNT, a multiple of chunk_size. Unset: no global memory, so no TNT."""
    shard_size: int = 2048
    """Tokens after which TNT's local memory begins anew, a multiple of chunk_size."""

    def spec_fields(self) -> dict[str, Any]:
        """The keyword arguments of this memory's MemorySpec: the preset's choices and, over them, those set here."""
        assert self.preset is not None
        changes = {name: getattr(self, name) for name in _CHOICES if getattr(self, name) is not None}
        return {**PRESETS[self.preset], **changes, "channel_wise": self.channel_wise}

    def choice(self, name: str) -> Any:
        """What this memory has for a field of MemorySpec, whether it is set here or by the preset."""
        own = getattr(self, name) if name in _CHOICES or name == "channel_wise" else None
        if own is not None:
            return own
        assert self.preset is not None
        preset = PRESETS[self.preset]
        return preset[name] if name in preset else _UNSAID[name]

    @property
    def is_tnt(self) -> bool:
        """Whether a global memory stands beside local ones (TNT)."""
        return self.global_chunk_size is not None


@dataclass
class ModelConfig:
    """The architecture of the language model, without a word on how it is split over processes."""

    variant: str = "mag"
    """What the blocks are: lmm (memory alone), mac, mag, mal (memory as context, gate, layer), transformer, swa,
    mamba2, deltanet or gated_deltanet."""
    num_layers: int = 4
    """Number of blocks, >= 1."""
    hidden_size: int = 192
    """Width of the residual stream, a multiple of num_heads."""
    num_heads: int = 4
    """Heads of the attention and of the memory; each has hidden_size / num_heads dimensions (even, for RoPE)."""
    num_kv_heads: int | None = None
    """Heads of the attention's keys and values, a divisor of num_heads (grouped-query attention). Unset: num_heads."""
    intermediate_size: int | None = None
    """Width of the SwiGLU MLP. Unset: what `parameters` leaves for it, else 8/3 of hidden_size, rounded up to a
    multiple of 64."""
    parameters: int | None = None
    """Parameters the model should have: the MLP's width becomes the multiple of 64 that comes nearest to it, unless
    intermediate_size is set."""
    vocab_size: int = 4096
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    window: int = 2048
    """Tokens a query of the sliding-window attention sees, itself included, >= 1."""
    segment_length: int = 2048
    """Tokens of a segment of mac, a multiple of memory.chunk_size."""
    persistent_tokens: int = 16
    """Learned tokens per layer that every query sees (persistent memory), >= 0."""
    conv_kernel: int = 4
    """Width of the causal depthwise convolution over q, k and v of the memory, in tokens, >= 1."""
    tie_embeddings: bool = True
    """Whether the output head uses the embedding's weight."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding of the attention, > 0."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm, > 0."""
    init_std: float = 0.02
    """Standard deviation of the initial projection weights, > 0."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """The neural memory inside every block: a MemoryConfig, or a dict of its fields."""

    def __post_init__(self) -> None:
        memory = memory_config(self.memory)
        if memory.preset is None:
            memory = replace(memory, preset=self.variant if self.variant in RECURRENT_VARIANTS else "titans")
        self.memory = memory

    @property
    def has_memory(self) -> bool:
        """Whether the blocks have a neural memory."""
        return self.variant not in ATTENTION_VARIANTS

    @property
    def head_dim(self) -> int:
        """Dimensions of one head."""
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Heads of the attention's keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def mlp_size(self) -> int:
        """Width of the SwiGLU MLP, with the default worked out."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        if self.parameters is not None:
            return sizes.mlp_size_for(self, self.parameters)
        return -(-8 * self.hidden_size // (3 * 64)) * 64

    @property
    def residual_std(self) -> float:
        """Standard deviation of the projections that write to the residual stream: 2 per block, as in GPT-2."""
        return self.init_std / (2 * self.num_layers) ** 0.5


def memory_config(given: MemoryConfig | Mapping[str, Any]) -> MemoryConfig:
    """`given`, or the MemoryConfig of a dict of its fields. Raises ConfigError for a field that does not exist."""
    if isinstance(given, MemoryConfig):
        return given
    if not isinstance(given, Mapping):
        raise ConfigError(f"memory is a {type(given).__name__}; give a MemoryConfig or a dict of its fields")
    known = [item.name for item in fields(MemoryConfig)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            meant = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
            raise ConfigError(f"memory has no field {name}; {meant}")
    return MemoryConfig(**given)
