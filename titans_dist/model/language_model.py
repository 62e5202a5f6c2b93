"""The language model: embedding, blocks, norm, head."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from titans_dist.config import ModelConfig
from titans_dist.config.validate import validate_model
from titans_dist.layers.mag import MemoryAsGate
from titans_dist.layers.mlp import SwiGLU
from titans_dist.layers.norm import RMSNorm
from titans_dist.layers.parameter import Parameter, initial_value, linear, normal, parameter


class Block(nn.Module):
    """Pre-norm residual block: a mixer over time, then an MLP."""

    plan: ClassVar = {"mixer_norm": "norm", "mlp_norm": "norm"}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = MemoryAsGate(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nn.Module):
    """tokens (B, T) int64 -> logits (B, T, vocab)."""

    plan: ClassVar = {"embedding": "vocabulary", "norm": "norm", "head": "column"}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        rows, width = config.vocab_size, config.hidden_size
        self.embedding = nn.Embedding(rows, width)
        self.embedding.weight = parameter(rows, width, init=normal(config.init_std), decay=True)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = linear(config.hidden_size, config.vocab_size, config.init_std)
        self.tie_embeddings()

    def tie_embeddings(self) -> None:
        """Let the head use the embedding's weight, where the config says so."""
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build_model(config: ModelConfig, seed: int = 0) -> LanguageModel:
    """The whole model on the CPU in float32, initialized from `seed`. Raises ConfigError for an illegal config."""
    validate_model(config)
    model = LanguageModel(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            assert isinstance(value, Parameter)
            value.copy_(initial_value(name, tuple(value.shape), value.init, seed))
    return model
