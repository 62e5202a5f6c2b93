"""The kit: what is broken is named, exactly; what is sound passes; what breaks the contract is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.conformance import models
from titans_dist.config import ConfigError, ModelConfig
from titans_dist.conformance import Verdict, check
from titans_dist.layers.inner_memory import InnerMemory
from titans_dist.model import build_model

ALL = ["causality", "batch independence", "gradient flow", "split invariance", "recurrence equality"]


def verdicts(target: Any, **settings: int) -> dict[str, Verdict]:
    """Verdict by property, on tokens that every model here knows."""
    found = check(target, **{"vocab_size": 32, "length": 24, "batch": 3, "probes": 23, **settings})
    assert [verdict.name for verdict in found] == ALL
    return {verdict.name: verdict for verdict in found}


def failed(target: Any) -> dict[str, str]:
    """Property -> evidence of all that fail."""
    return {name: verdict.evidence for name, verdict in verdicts(target).items() if verdict.passed is False}


def test_a_sound_model_passes_all_that_it_offers() -> None:
    found = verdicts(models.Sound())
    assert {name: verdict.word for name, verdict in found.items()} == {
        "causality": "pass",
        "batch independence": "pass",
        "gradient flow": "pass",
        "split invariance": "pass",
        "recurrence equality": "not offered",
    }
    assert found["causality"].evidence == (
        "largest change before the changed token 0.0e+00; 23 of 24 tokens changed in turn, in float64"
    )
    assert found["gradient flow"].evidence.startswith("all 3 parameters have one")


def test_a_look_at_the_next_token_is_found_however_small() -> None:
    ((name, evidence),) = failed(models.SeesTheNextToken()).items()
    assert name == "causality"
    token, output = map(int, evidence.split(" by ")[0].removeprefix("token ").split(" changed output "))
    assert output == token - 1
    assert 1e-11 < float(evidence.split(" by ")[1].split(";")[0]) < 1e-8


def test_a_leak_inside_blocks_is_found_with_few_probes() -> None:
    class Blocks(models.Sound):
        initial_state = models.SeesTheNextToken.initial_state
        begin = models.SeesTheNextToken.begin

        def mixed(self, x: Tensor) -> Tensor:
            return x + x.unflatten(1, (-1, 8)).mean(2, keepdim=True).expand(-1, -1, 8, -1).flatten(1, 2)

    found = verdicts(Blocks(), length=64, probes=6)
    assert [name for name in ALL if found[name].passed is False] == ["causality"]


def test_a_batch_that_is_normalized_together_is_found() -> None:
    ((name, evidence),) = failed(models.MixesTheBatch()).items()
    assert name == "batch independence"
    assert evidence.startswith("other tokens in the other sequences changed output ")


def test_batch_norm_in_training_mode_is_found_and_passes_in_evaluation_mode() -> None:
    class Normalized(models.Sound):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(models.WIDTH)

        def mixed(self, x: Tensor) -> Tensor:
            return self.norm(x.mT).mT

    assert "batch independence" in failed(Normalized())
    assert failed(Normalized().eval()) == {}


def test_outputs_that_depend_on_the_size_of_the_batch_are_found() -> None:
    ((name, evidence),) = failed(models.CountsTheBatch()).items()
    assert name == "batch independence"
    assert evidence.startswith("sequence 0 alone has another output ")


def test_parameters_without_a_gradient_are_named() -> None:
    assert failed(models.HasDeadParameter()) == {"gradient flow": "no gradient: unused, silenced"}


def test_layers_that_start_at_zero_are_no_dead_ends() -> None:
    class Residual(models.Sound):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(models.WIDTH, models.WIDTH)
            self.scale = nn.Parameter(torch.zeros(models.WIDTH))

        def mixed(self, x: Tensor) -> Tensor:
            return x + self.scale * torch.tanh(self.inner(x))

    model = Residual()
    assert failed(model) == {}
    assert not model.scale.any()


def test_a_frozen_parameter_is_not_expected_to_learn() -> None:
    model = models.HasDeadParameter()
    model.unused.requires_grad_(False)
    model.silenced.requires_grad_(False)
    assert failed(model) == {}


@pytest.mark.parametrize("broken", [models.ForgetsItsState, models.ForgetsTheHalf])
def test_a_state_that_forgets_is_found(broken: type[nn.Module]) -> None:
    ((name, evidence),) = failed(broken()).items()
    assert name == "split invariance"
    assert evidence.startswith("12 + 12 tokens changed output 1")


def test_a_model_that_cannot_be_cast_is_checked_as_it_is() -> None:
    found = verdicts(models.OnlyFloat32())
    assert found["causality"].evidence.endswith("in float32")
    assert not [verdict for verdict in found.values() if verdict.passed is False]


def test_the_model_itself_is_left_alone() -> None:
    model = models.Sound()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    verdicts(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.dtype == torch.float32 and p.grad is None for p in model.parameters())


def test_a_plain_function_is_checked_for_what_it_offers() -> None:
    table = torch.randn(32, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    words = {
        name: verdict.word for name, verdict in verdicts(lambda tokens: F.embedding(tokens, table).cumsum(1)).items()
    }
    assert words == dict(zip(ALL, ["pass", "pass", "not offered", "not offered", "not offered"], strict=True))


# Models of this project


SMALL = {
    "num_layers": 1,
    "hidden_size": 16,
    "num_heads": 2,
    "vocab_size": 32,
    "window": 6,
    "segment_length": 8,
    "persistent_tokens": 2,
}


@pytest.mark.parametrize("variant", ["lmm", "mac", "mag", "mal", "mamba2", "deltanet", "gated_deltanet"])
def test_variants_with_a_memory_have_all_five_properties(variant: str) -> None:
    memory = {"chunk_size": 4} if variant not in ("lmm", "mac", "mag", "mal") else {"chunk_size": 4, "expansion": 1}
    model = build_model(ModelConfig(variant=variant, memory=memory, **SMALL))  # type: ignore[arg-type]
    found = verdicts(model, batch=2, probes=8)
    assert [verdict.word for verdict in found.values()] == ["pass"] * 5, found


@pytest.mark.parametrize("variant", ["transformer", "swa"])
def test_variants_without_a_memory_have_the_other_four(variant: str) -> None:
    found = verdicts(build_model(ModelConfig(variant=variant, **SMALL)), batch=2, probes=8)  # type: ignore[arg-type]
    assert [verdict.word for verdict in found.values()] == ["pass"] * 4 + ["not offered"], found


def test_a_chunked_form_that_is_not_its_recurrence_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = InnerMemory.forward

    def twice_as_fast(self: InnerMemory, x: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> Any:
        return real(self, x, q, k, v if self.backend == "recurrent" else 1.001 * v, *rest, **named)

    monkeypatch.setattr(InnerMemory, "forward", twice_as_fast)
    model = build_model(ModelConfig(variant="lmm", memory={"chunk_size": 4}, **SMALL))  # type: ignore[arg-type]
    ((name, evidence),) = failed(model).items()
    assert name == "recurrence equality"
    assert evidence.startswith("token by token, output ")


# What breaks the contract


def drops_out() -> nn.Module:
    class Random(models.Sound):
        def mixed(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5)

    return Random()


def stateless_pair() -> nn.Module:
    class NoPair(models.Sound):
        def forward(self, tokens: Tensor, state: Tensor | None = None) -> Any:
            return super().forward(tokens)

    return NoPair()


def crashes(tokens: Tensor) -> Tensor:
    raise RuntimeError("no such\nkernel")


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        (3, "the target is of type int; it must be callable: tokens (B, T) -> outputs"),
        (
            lambda tokens: "text",
            "the target gives a value of type str; it must give a tensor of floating point numbers",
        ),
        (lambda tokens: tokens, "the target gives a tensor of torch.int64; it must give a tensor of floating"),
        (lambda tokens: tokens[:, 1:].float(), "the target gives outputs of shape (3, 23) for tokens (3, 24); they"),
        (lambda tokens: tokens / 0.0, "the target gives outputs that are not finite for tokens of shape (3, 24)"),
        (crashes, "the target failed: RuntimeError: no such kernel ("),
        (drops_out(), "the target gives other outputs when it is called again with the same tokens (by "),
        (stateless_pair(), "the target called with state= gives a value of type Tensor; it must give (outputs, state)"),
    ],
    ids=["no callable", "text", "integers", "shape", "not finite", "crash", "random", "no pair"],
)
def test_what_breaks_the_contract_is_refused_in_one_sentence(target: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        verdicts(target)
    assert str(refusal.value).startswith(sentence)
    assert "\n" not in str(refusal.value)


def test_too_small_a_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^batch=1 is too small for these checks; use 2 or more$"):
        check(models.Sound(), vocab_size=32, batch=1)
