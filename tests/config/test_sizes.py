"""The closed forms count what the layers have, and every model is as large as its name says."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from tests.config.test_composition import composed, options
from titans_dist.config import ModelConfig
from titans_dist.config.presets import PRESETS
from titans_dist.config.sizes import parameter_count
from titans_dist.model import LanguageModel

# Sizes that share no factor by accident: a wrong one in a formula changes the sum.
SMALL = ModelConfig(
    num_layers=2,
    hidden_size=30,
    num_heads=3,
    intermediate_size=7,
    vocab_size=53,
    window=5,
    segment_length=8,
    persistent_tokens=11,
    conv_kernel=3,
    memory={"chunk_size": 4, "expansion": 2, "gate_rank": 13},  # type: ignore[arg-type]
)
SIZES = {"170m": 170e6, "340m": 340e6, "760m": 760e6, "1b3": 1.3e9}
CHOICES = [f"variant={name}" for name in options("variant")] + [f"variant=lmm memory={m}" for m in options("memory")]


def real_count(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(value.numel() for value in LanguageModel(config).parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {"variant": "lmm"},
        {"variant": "mac"},
        {"variant": "mag"},
        {"variant": "mal"},
        {"variant": "transformer"},
        {"variant": "swa"},
        {"variant": "mamba2", "memory": {}},
        {"variant": "deltanet", "memory": {}},
        {"variant": "gated_deltanet", "memory": {}},
        {"variant": "mag", "tie_embeddings": False},
        {"variant": "mac", "persistent_tokens": 0},
        *({"variant": "lmm", "memory": {"preset": preset}} for preset in PRESETS),
        *({"variant": "lmm", "memory": {"depth": depth, "expansion": 3, "residual": False}} for depth in (1, 3, 4)),
        {"variant": "lmm", "memory": {"preset": "titans", "channel_wise": True, "gate_rank": 13}},
        {"variant": "lmm", "memory": {"preset": "yaad", "channel_wise": True, "gate_rank": 13}},
        {"variant": "lmm", "memory": {"preset": "linear_attention", "channel_wise": True, "gate_rank": 13}},
        {"variant": "lmm", "memory": {"preset": "titans", "chunk_size": 4, "global_chunk_size": 16, "shard_size": 8}},
        {"variant": "mag", "memory": {"preset": "moneta"}},
        {"variant": "mal", "memory": {"preset": "gated_deltanet"}},
        {"variant": "mac", "memory": {"preset": "yaad", "chunk_size": 4}},
        {"variant": "mag", "num_kv_heads": 1},
    ],
    ids=str,
)
def test_the_closed_form_counts_the_layers_parameters(changes: dict[str, object]) -> None:
    config = dataclasses.replace(SMALL, **changes)  # type: ignore[arg-type]
    assert parameter_count(config) == real_count(config)


@functools.cache
def sized(size: str, choice: str) -> ModelConfig:
    return composed(f"experiment=titans_{size}", *choice.split()).model


@functools.cache
def model(size: str, choice: str) -> ModelConfig:
    """The model of `model=SIZE` with a choice of variant and memory; composed once per size and once per choice."""
    base, chosen = sized(size, "variant=mag"), sized("170m", choice)
    same = ("variant", "memory", "persistent_tokens")
    return dataclasses.replace(base, **{name: getattr(chosen, name) for name in same})


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("size", SIZES)
def test_every_model_has_the_parameters_of_its_name(size: str, choice: str) -> None:
    config = model(size, choice)
    assert config.mlp_size % 64 == 0
    assert abs(parameter_count(config) / SIZES[size] - 1) < 0.03


@pytest.mark.parametrize("choice", ["variant=mac", "variant=mal", "variant=gated_deltanet", "variant=lmm memory=tnt"])
@pytest.mark.parametrize("size", ["170m", "760m"])
def test_the_layers_agree_at_full_size(size: str, choice: str) -> None:
    config = sized(size, choice)
    assert config == model(size, choice)
    assert real_count(config) == parameter_count(config)


@pytest.mark.parametrize("budget", [200_000, 333_333, 1_000_000])
def test_a_budget_is_met_as_nearly_as_a_multiple_of_64_can(budget: int) -> None:
    config = dataclasses.replace(SMALL, intermediate_size=None, parameters=budget)
    missed = abs(parameter_count(config) - budget)
    for width in (config.mlp_size - 64, config.mlp_size + 64):
        assert missed <= abs(parameter_count(dataclasses.replace(config, intermediate_size=width)) - budget)
