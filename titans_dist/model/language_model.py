"""The language model: embedding, blocks, norm, head."""

from __future__ import annotations

from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from titans_dist.config import ModelConfig
from titans_dist.config.validate import validate_model
from titans_dist.layers.inner_memory import InnerMemory
from titans_dist.layers.mixers import build_mixer
from titans_dist.layers.mlp import SwiGLU
from titans_dist.layers.norm import RMSNorm
from titans_dist.layers.parameter import Parameter, initial_value, linear, normal, parameter
from titans_dist.model.state import ModelState


class Block(nn.Module):
    """Pre-norm residual block: a mixer over time, then an MLP."""

    plan: ClassVar = {"mixer_norm": "norm", "mlp_norm": "norm"}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer: Any = build_mixer(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, state: Any = None, starts: Tensor | None = None) -> tuple[Tensor, Any]:
        """The state is the mixer's."""
        y, after = self.mixer(self.mixer_norm(x), state, starts)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), after


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
        self.recomputes_blocks = False
        self.tie_embeddings()

    def tie_embeddings(self) -> None:
        """Let the head use the embedding's weight, where the config says so."""
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight

    @overload
    def __call__(self, tokens: Tensor, state: None = None, starts: Tensor | None = None) -> Tensor: ...

    @overload
    def __call__(
        self, tokens: Tensor, state: ModelState, starts: Tensor | None = None
    ) -> tuple[Tensor, ModelState]: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)

    def forward(
        self, tokens: Tensor, state: ModelState | None = None, starts: Tensor | None = None
    ) -> Tensor | tuple[Tensor, ModelState]:
        """With a `state` (`initial_state`, or what an earlier call returned) the sequence goes on from there.

        Returns logits, or with a state (logits, the state after): any split of a sequence gives what one call gives.
        starts (B, T) bool: token t is the first of a document; documents do not see each other.
        """
        _check(tokens, state, starts)
        x, after = self.mix(self.embedding(tokens), state, starts)
        logits = self.head(self.norm(x))
        return logits if after is None else (logits, after)

    def mix(
        self, x: Tensor, state: ModelState | None = None, starts: Tensor | None = None
    ) -> tuple[Tensor, ModelState | None]:
        """The residual stream through the blocks; in a part of a model, where the others are None, those it has."""
        after: list[Any] = []
        for i, block in enumerate(self.blocks):
            before, done = None if state is None else state.layers[i], None
            if block is not None and self.recomputes_blocks and torch.is_grad_enabled():
                x, done = checkpoint(block, x, before, starts, use_reentrant=False, preserve_rng_state=False)
            elif block is not None:
                x, done = block(x, before, starts)
            after.append(done)
        return x, None if state is None else ModelState(after)

    def set_recompute(self, what: str) -> None:
        """What the backward pass works out again: none, the memories' states (selective) or whole blocks (full)."""
        self.recomputes_blocks = what == "full"
        for module in self.modules():
            if isinstance(module, InnerMemory):
                module.recompute = what != "none"

    def initial_state(self, batch_size: int) -> ModelState:
        """The state before the first token of `batch_size` sequences."""
        return ModelState([b and b.mixer.initial_state(batch_size) for b in self.blocks])  # type: ignore[union-attr, operator]


def _check(tokens: Tensor, state: ModelState | None, starts: Tensor | None) -> None:
    shape = tuple(tokens.shape)
    if len(shape) != 2 or 0 in shape or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"tokens has shape {shape} and dtype {tokens.dtype}; it must be (B, T), not empty, of int64")
    if starts is not None and (tuple(starts.shape) != shape or starts.dtype != torch.bool):
        raise ValueError(f"starts has shape {tuple(starts.shape)} and dtype {starts.dtype}; use {shape} and bool")
    if state is not None and state.batch_size != shape[0]:
        raise ValueError(
            f"state is of {state.batch_size} sequences, tokens of {shape[0]}; use initial_state({shape[0]})"
        )


def build_model(config: ModelConfig, seed: int = 0) -> LanguageModel:
    """The whole model on the CPU in float32, initialized from `seed`. Raises ConfigError for an illegal config."""
    validate_model(config)
    model = LanguageModel(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            assert isinstance(value, Parameter)
            value.copy_(initial_value(name, value, seed))
    return model
