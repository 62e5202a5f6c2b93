"""What the model is: sizes of the network and of its neural memory."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class MemoryConfig:
    """The neural memory of one layer: an MLP per head, written at test time (Titans, eqs 12-18)."""

    depth: int = 2
    """Layers of the memory MLP, 1 to 4. Depth 1 is a matrix."""
    expansion: int = 4
    """Width of the memory's hidden layers as a multiple of the head dimension, >= 1."""
    activation: str = "gelu"
    """Non-linearity between the memory's layers: gelu, silu, relu or identity."""
    residual: bool = True
    """Whether the memory is x + LayerNorm(MLP(x)) (MIRAS) instead of the plain MLP."""
    momentum: bool = True
    """Whether writes carry momentum (the past surprise of Titans, eq 10)."""
    chunk_size: int = 64
    """Tokens whose gradients are taken at the same memory, >= 1. Part of the model, not a tuning knob."""
    read: str = "after"
    """Whether a token reads the memory after its own write (after) or before it (before)."""
    theta_max: float | None = None
    """Largest inner learning rate, > 0. Unset: 1 / chunk_size; with momentum, which adds up to tenfold, a tenth of it:
    a chunk of equal keys then moves the memory by about one step."""


@dataclass
class ModelConfig:
    """The architecture of the language model, without a word on how it is split over processes."""

    variant: str = "mag"
    """Which Titans variant the blocks are: mag (memory as a gate)."""
    num_layers: int = 4
    """Number of blocks, >= 1."""
    hidden_size: int = 192
    """Width of the residual stream, a multiple of num_heads."""
    num_heads: int = 4
    """Heads of the attention and of the memory; each has hidden_size / num_heads dimensions (even, for RoPE)."""
    intermediate_size: int | None = None
    """Width of the SwiGLU MLP. Unset: 8/3 of hidden_size, rounded up to a multiple of 64."""
    vocab_size: int = 4096
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    window: int = 2048
    """Tokens a query of the sliding-window attention sees, itself included, >= 1."""
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
    """The neural memory inside every block."""

    @property
    def head_dim(self) -> int:
        """Dimensions of one head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        """Width of the SwiGLU MLP, with the default worked out."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return -(-8 * self.hidden_size // (3 * 64)) * 64

    @property
    def residual_std(self) -> float:
        """Standard deviation of the projections that write to the residual stream: 2 per block, as in GPT-2."""
        return self.init_std / (2 * self.num_layers) ** 0.5
