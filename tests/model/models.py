"""Tiny models of every kind, for the promises that all of them keep."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from titans_dist.config import ModelConfig
from titans_dist.config.model import VARIANTS
from titans_dist.model import LanguageModel, build_model

VOCABULARY = 32
CHUNK, SEGMENT, SHARD = 4, 8, 8
"""Every border is at a multiple of 8 tokens, some are at multiples of 4."""


def config(variant: str = "lmm", memory: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    """A model of two layers; `memory` and `changes` are fields that differ."""
    fields: dict[str, Any] = dict(
        num_layers=2,
        hidden_size=16,
        num_heads=2,
        intermediate_size=16,
        vocab_size=VOCABULARY,
        window=5,
        segment_length=SEGMENT,
        persistent_tokens=3,
    )
    return ModelConfig(
        variant=variant,
        # The gradients are to be those of the outputs, not clipped ones.
        memory={"expansion": 2, "chunk_size": CHUNK, "state_grad_clip": None, **(memory or {})},  # type: ignore[arg-type]
        **{**fields, **changes},
    )


MODELS = {
    **{variant: config(variant) for variant in VARIANTS},
    **{
        f"lmm_{preset}": config(memory={"preset": preset})
        for preset in ("moneta", "yaad", "memora", "retnet", "ttt_linear", "ttt_mlp", "longhorn")
    },
    "lmm_elastic_net": config(memory={"retention": "elastic_net"}),
    "lmm_deep_plain_before": config(memory={"depth": 3, "residual": False, "chunk_size": 3, "read": "before"}),
    "lmm_channel_wise": config(memory={"preset": "yaad", "channel_wise": True, "gate_rank": 3}),
    "lmm_tnt": config(memory={"global_chunk_size": 8, "shard_size": SHARD}),
    "lmm_online": config(memory={"chunk_size": 1, "anchor": "token"}),
    "mag_grouped": config("mag", num_kv_heads=1),
    "mac_memora": config("mac", {"preset": "memora"}),
    "mag_without_persistent": config("mag", persistent_tokens=0, tie_embeddings=False, conv_kernel=1),
    "mal_moneta": config("mal", {"preset": "moneta"}),
}


@functools.cache
def model(name: str) -> LanguageModel:
    """The model `name` in float64. Shared: do not change it."""
    return build_model(MODELS[name], seed=1).double()


def tokens(batch: int = 2, length: int = 21, seed: int = 0) -> Tensor:
    """Random tokens (B, T)."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
