"""What is said of a memory's health, against the same numbers worked out the long way."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from titans_dist.config import ModelConfig
from titans_dist.layers.inner_memory import InnerMemory
from titans_dist.layers.telemetry import BINS, HISTOGRAMS, NUMBERS, collect
from titans_dist.model import LanguageModel, build_model

LENGTH, CHUNK = 22, 4


def model(variant: str = "lmm", **memory: Any) -> LanguageModel:
    config = ModelConfig(
        variant=variant,
        num_layers=2,
        hidden_size=16,
        num_heads=2,
        vocab_size=32,
        window=6,
        segment_length=8,
        persistent_tokens=2,
        memory={"chunk_size": CHUNK, "expansion": 2, **memory},  # type: ignore[arg-type]
    )
    return build_model(config).double()


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randint(32, (3, length), generator=torch.Generator().manual_seed(0))


def watched(model: LanguageModel, x: Tensor) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """What telemetry says, and the arguments and results of each memory's last call, by path."""
    seen: dict[str, dict[str, Any]] = {}
    real = InnerMemory.forward

    def write(self: InnerMemory, *args: Any, **named: Any) -> Any:
        result = real(self, *args, **named)
        path = next(path for path, module in model.named_modules() if module is self)
        seen[path] = {"x": args[0], "k": args[2], "v": args[3], "start": args[4], "end": result[1]}
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InnerMemory, "forward", write)
        with collect() as records:
            model(x)
    return records.summary(model), seen


def test_every_memory_has_every_number() -> None:
    found, _ = watched(model(), tokens())
    assert list(found) == ["blocks.0.mixer.memory.memory", "blocks.1.mixer.memory.memory"]
    for layer in found.values():
        assert set(layer) == {*NUMBERS, *HISTOGRAMS}
        assert all(math.isfinite(layer[name]) for name in NUMBERS)


def test_surprise_is_the_inner_loss_of_the_last_pairs_before_and_after() -> None:
    net = model(residual=False)
    found, seen = watched(net, tokens())
    for path, call in seen.items():
        last = LENGTH % CHUNK
        k, v = call["k"][:, -last:], call["v"][:, -last:]
        for name, state in (("surprise_before", call["start"]), ("surprise_after", call["end"])):
            losses = []
            for b in range(3):
                for h in range(2):
                    first, second = (w[b, h] for w in state.weights)
                    error = torch.nn.functional.gelu(k[b, :, h] @ first) @ second - v[b, :, h]
                    losses.append(error.square().sum(-1))
            assert found[path][name] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


def test_norms_are_of_whole_memories() -> None:
    found, seen = watched(model(), tokens())
    for path, call in seen.items():
        for name, layers in (("w_norm", call["end"].weights), ("s_norm", call["end"].momentum)):
            whole = torch.cat([x.flatten(2) for x in layers], -1).norm(dim=-1).mean()
            assert found[path][name] == pytest.approx(whole.item(), rel=1e-4)


def test_gates_means_histograms_and_the_horizon() -> None:
    net = model()
    found, seen = watched(net, tokens())
    for path, call in seen.items():
        gates = net.get_submodule(path).gates(call["x"], call["k"])  # type: ignore[operator, union-attr]
        for name in HISTOGRAMS:
            values, histogram = getattr(gates, name), found[path][name]
            assert found[path][f"{name}_mean"] == pytest.approx(values.mean().item(), rel=1e-4)
            assert histogram["low"] == pytest.approx(values.min().item(), rel=1e-4)
            assert histogram["high"] == pytest.approx(values.max().item(), rel=1e-4)
            counts = torch.histogram(values.detach().flatten(), BINS).hist
            assert histogram["counts"] == [int(count) for count in counts]
        kept = torch.exp(torch.log(1 - gates.alpha).mean()).item()
        assert kept ** found[path]["horizon"] == pytest.approx(1 / math.e, rel=1e-3)


def test_saturated_gates_are_those_at_either_end_of_their_range() -> None:
    net = model()
    gates: Any = net.blocks[0].mixer.memory.memory.gates  # type: ignore[union-attr]
    with torch.no_grad():
        for gate, biases in ((gates.alpha, [-20.0, 0.0]), (gates.eta, [20.0, 20.0]), (gates.theta, [0.0, 20.0])):
            gate.map.weight.zero_()
            gate.map.bias.copy_(torch.tensor(biases))
    found = watched(net, tokens())[0]["blocks.0.mixer.memory.memory"]
    assert [found[f"{name}_saturated"] for name in HISTOGRAMS] == [0.5, 1.0, 0.5]


@pytest.mark.parametrize(
    ("memory", "absent"),
    [
        ({"preset": "yaad"}, {"eta", "eta_mean", "eta_saturated", "s_norm"}),
        ({"preset": "ttt_mlp"}, {"alpha", "alpha_mean", "alpha_saturated", "horizon", "eta", "eta_mean"}),
        ({"preset": "mamba2"}, {"theta_saturated", "eta", "eta_mean", "eta_saturated", "s_norm"}),
    ],
    ids=lambda value: value.get("preset") if isinstance(value, dict) else None,
)
def test_what_a_memory_does_not_have_is_none(memory: dict[str, Any], absent: set[str]) -> None:
    for layer in watched(model(**memory), tokens())[0].values():
        without = {name for name, value in layer.items() if value is None}
        assert absent <= without
        assert "surprise_after" not in without and "theta" not in without


@pytest.mark.parametrize("preset", ["moneta", "memora", "ttt_linear", "gated_deltanet", "longhorn", "linear_attention"])
def test_every_memory_can_be_watched(preset: str) -> None:
    for layer in watched(model(preset=preset), tokens())[0].values():
        assert all(value is None or math.isfinite(value) for value in (layer[name] for name in NUMBERS))


def test_variants_name_each_of_their_memories() -> None:
    assert "blocks.0.mixer.memory.memory" in watched(model("mac"), tokens())[0]
    tnt = watched(model(global_chunk_size=8, shard_size=8), tokens())[0]
    assert list(tnt)[:2] == ["blocks.0.mixer.memory.memory.everything", "blocks.0.mixer.memory.memory.shard"]
    assert watched(model("swa"), tokens())[0] == {}


def test_looking_changes_nothing() -> None:
    net, x = model(), tokens()
    plain = net(x)
    plain.sum().backward()
    grads = [value.grad for value in net.parameters()]
    net.zero_grad()
    with collect():
        seen = net(x)
    seen.sum().backward()
    assert torch.equal(plain, seen)
    assert all(torch.equal(a, value.grad) for a, value in zip(grads, net.parameters(), strict=True))  # type: ignore[arg-type]


def test_nothing_is_collected_outside_of_a_block() -> None:
    net = model()
    with collect() as records:
        pass
    net(tokens())
    assert records.summary(net) == {}


def test_a_memory_that_is_not_finite_says_so() -> None:
    net = model()
    with torch.no_grad():
        net.blocks[0].mixer.memory.memory.weights[0].fill_(math.nan)  # type: ignore[union-attr]
    found = watched(net, tokens())[0]["blocks.0.mixer.memory.memory"]
    assert math.isnan(found["w_norm"]) and math.isnan(found["surprise_after"])
