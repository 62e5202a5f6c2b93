"""What every model here promises: causal, no leak between sequences, every parameter learns."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from titans_dist.config import ConfigError, MemoryConfig, ModelConfig
from titans_dist.model import LanguageModel, build_model, describe

SMALL = ModelConfig(
    num_layers=2,
    hidden_size=16,
    num_heads=2,
    vocab_size=32,
    window=5,
    persistent_tokens=3,
    memory=MemoryConfig(expansion=2, chunk_size=4),
)
VARIANTS = {
    "default": SMALL,
    "before": dataclasses.replace(SMALL, memory=dataclasses.replace(SMALL.memory, read="before")),
    "deep_plain": dataclasses.replace(SMALL, memory=MemoryConfig(depth=3, residual=False, chunk_size=3)),
    "no_momentum": dataclasses.replace(SMALL, memory=MemoryConfig(depth=1, momentum=False, chunk_size=4)),
    "no_persistent": dataclasses.replace(SMALL, persistent_tokens=0),
    "untied": dataclasses.replace(SMALL, tie_embeddings=False),
}


@pytest.fixture(params=VARIANTS, ids=str)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return build_model(VARIANTS[request.param], seed=1).double()


def tokens(batch: int = 2, length: int = 14, seed: int = 0) -> Tensor:
    return torch.randint(0, SMALL.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_changing_a_token_changes_nothing_before_it(model: LanguageModel) -> None:
    x = tokens()
    logits = model(x)
    assert logits.shape == (2, 14, SMALL.vocab_size)
    for j in range(x.shape[1]):
        changed = x.clone()
        changed[:, j] = (changed[:, j] + 1) % SMALL.vocab_size
        other = model(changed)
        assert torch.equal(logits[:, :j], other[:, :j])
        assert not torch.isclose(logits[:, j], other[:, j]).all()


def test_a_token_reaches_beyond_the_window_through_the_memory(model: LanguageModel) -> None:
    x = tokens(1, 40)
    changed = x.clone()
    changed[:, 0] = (changed[:, 0] + 1) % SMALL.vocab_size
    reach = SMALL.num_layers * (SMALL.window - 1) + SMALL.num_layers * (SMALL.conv_kernel - 1)
    difference = (model(x) - model(changed))[0, reach + 5 :].abs().max()
    assert difference > 1e-12


def test_a_sequence_does_not_see_the_others_of_its_batch(model: LanguageModel) -> None:
    x = tokens(3)
    together = model(x)
    for i in range(3):
        torch.testing.assert_close(model(x[i : i + 1])[0], together[i], rtol=1e-10, atol=1e-10)


def test_every_parameter_gets_a_gradient(model: LanguageModel) -> None:
    x = tokens(2, 15)
    F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert without == []


def test_the_first_loss_is_that_of_a_uniform_guess() -> None:
    config = dataclasses.replace(SMALL, vocab_size=512)
    model = build_model(config, seed=0)
    x = torch.randint(0, 512, (8, 65), generator=torch.Generator().manual_seed(3))
    loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
    assert abs(loss.item() - torch.tensor(512.0).log().item()) < 0.1


def test_the_seed_decides_the_weights() -> None:
    a, b, c = build_model(SMALL, seed=1), build_model(SMALL, seed=1), build_model(SMALL, seed=2)
    for (name, x), y, z in zip(a.named_parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(x, y), name
        random = not (x == x.flatten()[0]).all()
        assert torch.equal(x, z) != random, name


def test_builds_in_a_bare_process() -> None:
    program = (
        "import torch; from titans_dist.config import ModelConfig; from titans_dist.model import build_model;"
        "m = build_model(ModelConfig(hidden_size=32, num_heads=2, vocab_size=64, num_layers=1));"
        "print(tuple(m(torch.zeros(1, 5, dtype=torch.long)).shape)); import sys; print('megatron' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env={})
    assert done.stdout.split("\n")[:2] == ["(1, 5, 64)", "False"]


def test_an_illegal_model_is_refused_with_a_legal_value() -> None:
    with pytest.raises(ConfigError, match=r"hidden_size=18 .* such as 16"):
        build_model(dataclasses.replace(SMALL, hidden_size=18, num_heads=4))


def test_describe_counts_every_parameter_once() -> None:
    rows = describe(SMALL, tensor_parallel=2)
    assert sum(count for _, _, count, _ in rows) == sum(p.numel() for p in build_model(SMALL).parameters())
    split = {name: how for name, _, _, how in rows}
    assert split["blocks.0-1.mlp.down.weight"] == "inputs / 2"
    assert split["blocks.0-1.mixer.memory.weights.0"] == "heads / 2"
    assert split["blocks.0-1.mixer_norm.weight"] == "whole"
    assert split["embedding.weight"] == "rows / 2"
