"""Generation draws what the model's logits say, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.model.models import MODELS, model, tokens
from titans_dist.config import ConfigError
from titans_dist.model import generate
from titans_dist.model.generate import probabilities


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_greedy_takes_the_likeliest_token_of_a_full_pass_each_time(name: str) -> None:
    prompt = tokens(2, 7)
    wanted = prompt
    for _ in range(9):
        wanted = torch.cat([wanted, model(name)(wanted)[:, -1:].argmax(-1)], 1)
    assert torch.equal(generate(model(name), prompt, 9, temperature=0), wanted)


def by_hand(logits: list[float], temperature: float, top_k: int | None, top_p: float | None) -> list[float]:
    """Each token's probability, from the definitions, in plain Python."""
    import math

    weights = [math.exp(x / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])[:top_k]
    total = sum(weights[i] for i in order)
    kept, share = [], 0.0
    for i in order:
        kept.append(i)
        share += weights[i] / total
        if top_p is not None and share >= top_p:
            break
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [None, 1, 3, 50])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.6, 0.95, 1.0])
def test_probabilities_are_those_of_the_definition(temperature: float, top_k: int | None, top_p: float | None) -> None:
    logits = torch.randn(4, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    found = probabilities(logits, temperature, top_k, top_p)
    wanted = torch.tensor([by_hand(row, temperature, top_k, top_p) for row in logits.tolist()], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_draws_follow_the_probabilities_and_the_seed() -> None:
    chosen, prompt = model("lmm"), tokens(1, 5).expand(4000, 5)
    drawn = generate(chosen, prompt, 1, temperature=0.2, top_k=6, generator=torch.Generator().manual_seed(4))[:, -1]
    wanted = probabilities(chosen(prompt[:1])[:, -1].float(), 0.2, 6, None)[0]
    found = torch.bincount(drawn, minlength=32) / 4000
    assert found[wanted == 0].max() == 0
    assert (found - wanted).abs().max() < 0.04
    again = generate(chosen, prompt, 1, temperature=0.2, top_k=6, generator=torch.Generator().manual_seed(4))[:, -1]
    other = generate(chosen, prompt, 1, temperature=0.2, top_k=6, generator=torch.Generator().manual_seed(5))[:, -1]
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, other)


def test_the_prompt_stays_in_front() -> None:
    prompt = tokens(3, 4)
    found = generate(model("mag"), prompt, 2)
    assert found.shape == (3, 6)
    assert torch.equal(found[:, :4], prompt)
    assert torch.equal(generate(model("mag"), prompt, 0), prompt)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 is out of range; use 0"),
        ({"temperature": float("nan")}, "temperature=nan is out of range"),
        ({"top_k": 0}, "top_k=0 leaves no token; use 1 or more"),
        ({"top_p": 0.0}, "top_p=0.0 is no share; use a number above 0"),
        ({"top_p": 1.5}, "top_p=1.5 is no share"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1 is negative; use 0 or more"),
        ({"prompt": torch.zeros(1, 0, dtype=torch.long)}, r"prompt has shape \(1, 0\) .* with T >= 1"),
        ({"prompt": torch.zeros(2, 3)}, r"prompt has shape \(2, 3\) and dtype torch.float32"),
        ({"prompt": torch.tensor([[1, 32]])}, "prompt has token 32; this model knows 0 to 31"),
        ({"prompt": torch.tensor([[-1, 3]])}, "prompt has token -1; this model knows 0 to 31"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_in_one_sentence(values: dict[str, Any], sentence: str) -> None:
    arguments = {"prompt": tokens(1, 3), "max_new_tokens": 1, **values}
    with pytest.raises(ConfigError, match=sentence):
        generate(model("mag"), **arguments)
