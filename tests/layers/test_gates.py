"""Which gates a memory has, and what they are before training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from titans_dist.config import ModelConfig
from titans_dist.layers.gates import ALPHA, ETA
from titans_dist.layers.inner_memory import InnerMemory
from titans_dist.model import build_model


def inner(**memory: Any) -> InnerMemory:
    """The memory of the first layer of a model that has not been trained."""
    config = ModelConfig(variant="lmm", num_layers=1, hidden_size=32, num_heads=4, vocab_size=16, memory=memory)  # type: ignore[arg-type]
    return build_model(config).blocks[0].mixer.memory.memory  # type: ignore[union-attr, return-value]


def gates(memory: InnerMemory, x: Tensor | None = None) -> dict[str, Tensor | None]:
    x = torch.zeros(2, 3, 32) if x is None else x
    return vars(memory.gates(x, torch.zeros(2, 3, 4, 8)))


@pytest.mark.parametrize(
    ("preset", "names"),
    [
        ("titans", {"alpha", "eta", "theta"}),
        ("moneta", {"alpha", "theta"}),
        ("yaad", {"alpha", "theta", "delta"}),
        ("memora", {"alpha", "theta"}),
        ("ttt_mlp", {"theta"}),
        ("linear_attention", {"theta"}),
        ("mamba2", {"alpha", "theta"}),
        ("retnet", {"alpha", "theta"}),
        ("deltanet", {"theta"}),
        ("gated_deltanet", {"alpha", "theta"}),
        ("longhorn", {"theta"}),
    ],
)
def test_each_memory_has_the_gates_it_uses(preset: str, names: set[str]) -> None:
    found = gates(inner(preset=preset))
    assert {name for name, value in found.items() if value is not None} == names
    assert all(value.shape == (2, 3, 4) for value in found.values() if value is not None)


def test_before_training_little_is_forgotten_and_momentum_is_kept() -> None:
    found = gates(inner(preset="titans"))
    for name, value in (("alpha", ALPHA), ("eta", ETA)):
        torch.testing.assert_close(found[name], torch.full((2, 3, 4), value))
    assert ALPHA <= 0.01
    assert ETA >= 0.9


@pytest.mark.parametrize("preset", ["linear_attention", "retnet", "mamba2"])
def test_the_dot_losses_write_the_whole_outer_product(preset: str) -> None:
    x = torch.randn(2, 3, 32)
    theta = gates(inner(preset=preset), x)["theta"]
    assert theta is not None
    assert (theta == 0.5).all()  # theta = 1/2 and the loss's factor 2


@pytest.mark.parametrize("preset", ["deltanet", "gated_deltanet", "longhorn"])
def test_the_delta_rules_have_beta_between_0_and_1(preset: str) -> None:
    memory = inner(preset=preset)
    theta = gates(memory, torch.randn(2, 3, 32) * 1e4)["theta"]
    assert theta is not None
    assert theta.min() < 0.01
    assert 0.49 < theta.max() <= 0.5  # theta = beta / 2


@pytest.mark.parametrize("chunk_size", [8, 64])
def test_the_largest_theta_goes_with_the_chunk(chunk_size: int) -> None:
    theta = gates(inner(chunk_size=chunk_size), torch.randn(2, 3, 32) * 1e4)["theta"]
    other = gates(inner(chunk_size=2 * chunk_size), torch.randn(2, 3, 32) * 1e4)["theta"]
    assert theta is not None and other is not None
    torch.testing.assert_close(theta.max(), 2 * other.max(), rtol=1e-3, atol=0)
    chosen = gates(inner(chunk_size=chunk_size, theta_max=0.7), torch.randn(2, 3, 32) * 1e4)["theta"]
    assert chosen is not None
    assert 0.69 < chosen.max() <= 0.7


def test_retnet_forgets_at_one_rate_per_head_that_is_no_parameter() -> None:
    memory = inner(preset="retnet")
    alpha = gates(memory, torch.randn(2, 3, 32))["alpha"]
    assert alpha is not None
    assert alpha[1, 2].tolist() == [2**-5, 2**-6, 2**-7, 2**-8]
    assert not any("alpha" in name for name, _ in memory.named_parameters())


def test_channel_wise_gates_are_of_every_channel_through_a_low_rank() -> None:
    memory = inner(preset="yaad", channel_wise=True, gate_rank=3)
    found = gates(memory, torch.randn(2, 3, 32))
    assert found["alpha"] is not None and found["theta"] is not None and found["delta"] is not None
    assert found["alpha"].shape == found["theta"].shape == (2, 3, 4, 8)
    assert found["delta"].shape == (2, 3, 4)
    logits = found["alpha"].logit().flatten(0, 1).flatten(1)
    x = torch.randn(50, 1, 32)
    alpha = memory.gates(x, torch.zeros(50, 1, 4, 8)).alpha
    assert alpha is not None
    logits = alpha.double().logit().flatten(1)
    assert torch.linalg.matrix_rank(logits - logits.mean(0), rtol=1e-3) == 3


@pytest.mark.parametrize("preset", ["linear_attention", "retnet", "mamba2", "deltanet", "gated_deltanet", "longhorn"])
def test_linear_recurrences_begin_with_nothing(preset: str) -> None:
    assert all((w == 0).all() for w in inner(preset=preset).weights)


@pytest.mark.parametrize("preset", ["titans", "moneta", "yaad", "memora", "ttt_mlp", "ttt_linear"])
def test_networks_begin_as_one(preset: str) -> None:
    assert all(w.std() > 0.01 for w in inner(preset=preset).weights)
