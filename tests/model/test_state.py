"""The state is data: named tensors, saved and loaded, refused where it does not belong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.model.models import MODELS, model, tokens
from titans_dist.config import CheckpointError
from titans_dist.model import flatten, load_state, save_state, unflatten

LENGTH, BORDER = 20, 9
"""The border lies inside a chunk, a segment and a shard."""


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_saved_state_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    chosen, x = model(name), tokens(2, LENGTH)
    _, state = chosen(x[:, :BORDER], state=chosen.initial_state(2))
    save_state(state, tmp_path / "state.safetensors")
    loaded = load_state(tmp_path / "state.safetensors", chosen, batch_size=2)
    wanted, last = chosen(x[:, BORDER:], state=state)
    found, other = chosen(x[:, BORDER:], state=loaded)
    assert torch.equal(found, wanted)
    assert all(torch.equal(a, b) for a, b in zip(flatten(last).values(), flatten(other).values(), strict=True))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_flatten_and_unflatten_are_each_other_s_reverse(name: str) -> None:
    chosen = model(name)
    for length in (1, BORDER, 24):
        _, state = chosen(tokens(1, length), state=chosen.initial_state(1))
        flat = flatten(state)
        again = flatten(unflatten(flat, like=chosen.initial_state(1)))
        assert list(again) == list(flat)
        assert all(torch.equal(again[key], flat[key]) for key in flat)


def test_the_names_say_what_the_tensors_are(tmp_path: Path) -> None:
    save_state(model("mag").initial_state(3), tmp_path / "state.safetensors")
    found = {name: tuple(x.shape) for name, x in load_file(tmp_path / "state.safetensors").items()}
    assert found["layers.0.attention.k"] == (3, 4, 2, 8)
    assert found["layers.1.memory.tails.2"] == (3, 3, 16)
    assert found["layers.1.memory.memory.weights.0"] == (3, 2, 8, 16)
    assert found["layers.1.memory.memory.position"] == ()


@pytest.mark.parametrize(
    ("other", "batch", "sentence"),
    [
        (
            "mag",
            3,
            r"layers.0.memory.tails.0 of the state has shape \(2, 3, 16\), this model and batch need \(3, 3, 16\)",
        ),
        ("lmm", 2, r"the state has no layers.0.tails.0; it is not of this model"),
        ("mal_moneta", 2, r"the state has layers.0.memory.memory.momentum.0, which this model does not have"),
    ],
)
def test_the_state_of_another_model_or_batch_is_refused(other: str, batch: int, sentence: str, tmp_path: Path) -> None:
    save_state(model("mag").initial_state(2), tmp_path / "state.safetensors")
    with pytest.raises(CheckpointError, match=sentence):
        load_state(tmp_path / "state.safetensors", model(other), batch_size=batch)


def test_a_state_whose_keys_are_too_many_is_refused() -> None:
    """Only full attention's cache may have any length."""
    flat = flatten(model("swa").initial_state(1))
    flat["layers.0.k"] = torch.zeros(1, 9, 2, 8)
    with pytest.raises(CheckpointError, match=r"layers.0.k of the state has shape \(1, 9, 2, 8\)"):
        unflatten(flat, like=model("swa").initial_state(1))


def test_what_is_no_state_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.safetensors").write_text("hello")
    for path in (tmp_path / "state.safetensors", tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match="is no saved state"):
            load_state(path, model("mag"), batch_size=1)
