"""What every model here promises: causal, no leak between sequences, every parameter learns."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from tests.model.models import MODELS, VOCABULARY, config, model, tokens
from titans_dist.config import ConfigError
from titans_dist.model import build_model, describe

MAG = config("mag")


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_changing_a_token_changes_nothing_before_it(name: str) -> None:
    x = tokens()
    logits = model(name)(x)
    assert logits.shape == (2, 21, VOCABULARY)
    for j in range(0, 21, 2):
        changed = x.clone()
        changed[:, j] = (changed[:, j] + 1) % VOCABULARY
        other = model(name)(changed)
        assert torch.equal(logits[:, :j], other[:, :j])
        assert not torch.isclose(logits[:, j], other[:, j]).all()


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("swa", "transformer")])
@torch.no_grad()
def test_a_token_reaches_beyond_window_and_convolution_through_the_memory(name: str) -> None:
    chosen = model(name)
    x = tokens(1, 32)
    changed = x.clone()
    changed[:, 0] = (changed[:, 0] + 1) % VOCABULARY
    settings = chosen.config
    nearby = max(settings.segment_length, settings.window - 1 + settings.conv_kernel - 1)
    reach = settings.num_layers * nearby
    assert (chosen(x) - chosen(changed))[0, reach + 5 :].abs().max() > 1e-12


@torch.no_grad()
def test_the_window_alone_reaches_no_farther() -> None:
    chosen = model("swa")
    x = tokens(1, 32)
    changed = x.clone()
    changed[:, 0] = (changed[:, 0] + 1) % VOCABULARY
    reach = chosen.config.num_layers * (chosen.config.window - 1)
    difference = (chosen(x) - chosen(changed))[0].abs().amax(-1)
    assert difference[reach] > 0
    assert difference[reach + 1 :].max() == 0


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_sequence_does_not_see_the_others_of_its_batch(name: str) -> None:
    x = tokens(3, 13)
    together = model(name)(x)
    for i in range(3):
        torch.testing.assert_close(model(name)(x[i : i + 1])[0], together[i], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    x, parameters = tokens(2, 18), dict(model(name).named_parameters())
    loss = F.cross_entropy(model(name)(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    without = [n for n, g in zip(parameters, grads, strict=True) if g is None or not g.abs().max() > 0]
    assert without == []


@pytest.mark.parametrize("name", ["mag", "mac", "lmm_moneta"])
def test_working_the_memory_out_again_changes_no_gradient(name: str) -> None:
    x = tokens(2, 18)
    found = []
    for recompute in ("none", "selective", "full"):
        chosen = build_model(MODELS[name], seed=1).double()
        chosen.set_recompute(recompute)
        F.cross_entropy(chosen(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).backward()
        found.append([p.grad for p in chosen.parameters()])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["mag", "mac", "gated_deltanet", "lmm_memora"])
def test_the_first_loss_is_that_of_a_uniform_guess(name: str) -> None:
    chosen = build_model(dataclasses.replace(MODELS[name], vocab_size=512), seed=0)
    x = torch.randint(0, 512, (8, 65), generator=torch.Generator().manual_seed(3))
    loss = F.cross_entropy(chosen(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
    assert abs(loss.item() - torch.tensor(512.0).log().item()) < 0.1


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_gives_about_the_same(name: str) -> None:
    x = tokens()
    exact = model(name)(x)
    rough = build_model(MODELS[name], seed=1).bfloat16()(x)
    assert rough.dtype == torch.bfloat16
    assert (rough.double() - exact).abs().max() < 0.15 * exact.abs().max()


def test_the_seed_decides_the_weights() -> None:
    a, b, c = build_model(MAG, seed=1), build_model(MAG, seed=1), build_model(MAG, seed=2)
    for (name, x), y, z in zip(a.named_parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(x, y), name
        random = not (x == x.flatten()[0]).all()
        assert torch.equal(x, z) != random, name


def test_builds_in_a_bare_process_with_the_memory_as_a_dict() -> None:
    program = (
        "import torch; from titans_dist.config import ModelConfig; from titans_dist.model import build_model;"
        "m = build_model(ModelConfig(variant='mac', hidden_size=32, num_heads=2, vocab_size=64, num_layers=1,"
        " segment_length=8, memory={'preset': 'moneta', 'chunk_size': 4}));"
        "print(tuple(m(torch.zeros(1, 5, dtype=torch.long)).shape)); import sys; print('megatron' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env={})
    assert done.stdout.split("\n")[:2] == ["(1, 5, 64)", "False"]


def test_an_illegal_model_is_refused_with_a_legal_value() -> None:
    with pytest.raises(ConfigError, match=r"hidden_size=18 .* such as 16"):
        build_model(dataclasses.replace(MAG, hidden_size=18, num_heads=4))


@pytest.mark.parametrize(
    ("x", "arguments", "sentence"),
    [
        (torch.zeros(3, dtype=torch.long), {}, r"tokens has shape \(3,\) and dtype torch.int64; it must be \(B, T\)"),
        (torch.zeros(2, 0, dtype=torch.long), {}, r"tokens has shape \(2, 0\)"),
        (torch.zeros(2, 3), {}, r"tokens has shape \(2, 3\) and dtype torch.float32"),
        (tokens(2, 3), {"starts": torch.zeros(2, 4, dtype=torch.bool)}, r"starts has shape \(2, 4\) .* use \(2, 3\)"),
        (tokens(2, 3), {"starts": torch.zeros(2, 3)}, r"starts has .* dtype torch.float32; use \(2, 3\) and bool"),
        (tokens(2, 3), {"state": 4}, r"state is of 4 sequences, tokens of 2; use initial_state\(2\)"),
    ],
    ids=str,
)
def test_input_that_does_not_fit_is_refused(x: torch.Tensor, arguments: dict[str, object], sentence: str) -> None:
    chosen = model("mag")
    if "state" in arguments:
        arguments = {"state": chosen.initial_state(4)}
    with pytest.raises(ValueError, match=sentence):
        chosen(x, **arguments)  # type: ignore[call-overload]


@pytest.mark.parametrize("name", ["mag", "lmm_tnt", "mac", "lmm_channel_wise"])
def test_describe_counts_every_parameter_once(name: str) -> None:
    rows = describe(MODELS[name], tensor_parallel=2)
    assert sum(count for _, _, count, _ in rows) == sum(p.numel() for p in model(name).parameters())


def test_describe_says_how_each_is_split() -> None:
    split = {name: how for name, _, _, how in describe(MAG, tensor_parallel=2)}
    assert split["blocks.0-1.mlp.down.weight"] == "inputs / 2"
    assert split["blocks.0-1.mixer.memory.memory.weights.0"] == "heads / 2"
    assert split["blocks.0-1.mixer.memory.memory.gates.alpha.map.weight"] == "outputs / 2"
    assert split["blocks.0-1.mixer_norm.weight"] == "whole"
    assert split["embedding.weight"] == "rows / 2"
