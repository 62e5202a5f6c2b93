"""What makes two starts under one name the same run, and what is said when they are not."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from titans_dist.config import CheckpointError, Config
from titans_dist.run.identity import check_identity, check_model, identity


def config(**changes: Any) -> Config:
    """A config with `model__memory__depth=3` and the like set."""
    result = Config(name="run", run_dir="runs/run")
    for path, value in changes.items():
        *sections, key = path.split("__")
        section: Any = result
        for name in sections:
            section = getattr(section, name)
        assert hasattr(section, key)
        setattr(section, key, value)
    return result


SAVED = identity(config())


def test_the_identity_is_flat_and_survives_json() -> None:
    assert json.loads(json.dumps(SAVED)) == SAVED
    assert SAVED["model.memory.depth"] == 2
    assert SAVED["data.seed"] == 1234
    assert not [value for value in SAVED.values() if isinstance(value, dict)]


@pytest.mark.parametrize(
    "change",
    [
        {"parallel__tensor": 2},
        {"parallel__data": 4},
        {"training__steps": 1000},
        {"training__micro_batch_size": 1},
        {"checkpoint__interval": 7},
        {"training__precision": "bfloat16"},
        {"optimizer__lr": 1.0},
        {"data__path": "elsewhere"},
        {"data__workers": 2},
        {"run_dir": "moved/run"},
        {"cluster__threads": 4},
        {"training__recompute": "full"},
        {"model__memory__state_grad_clip": None},
        {"model__memory__backend": "compiled"},
        {"model__memory__depth": 2},  # what it was, by name of the preset
        {"model__intermediate_size": 512},  # the same
    ],
    ids=lambda change: next(iter(change)),
)
def test_layout_length_learning_rate_and_places_may_change(change: dict[str, Any]) -> None:
    check_identity(SAVED, identity(config(**change)), "runs/run")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model__num_layers": 9}, "model.num_layers=9 (it was 4)"),
        ({"model__memory__depth": 3}, "model.memory.depth=3 (it was 2)"),
        ({"model__memory__theta_max": 0.5}, "model.memory.theta_max=0.5 (it was None)"),
        ({"data__sequence_length": 128}, "data.sequence_length=128 (it was 256)"),
        ({"data__seed": 1}, "data.seed=1 (it was 1234)"),
        ({"data__shuffle_shards": 8}, "data.shuffle_shards=8 (it was 16)"),
        ({"training__seed": 1}, "training.seed=1 (it was 1234)"),
        ({"training__global_batch_size": 32}, "training.global_batch_size=32 (it was 16)"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_another_model_or_order_of_the_data_is_another_run(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CheckpointError) as refusal:
        check_identity(SAVED, identity(config(**change)), "runs/run")
    assert str(refusal.value) == (
        f"runs/run holds another run: {sentence}; give this one its own name=NAME or use the old values"
    )


def test_three_differences_are_named_and_the_rest_is_counted() -> None:
    now = identity(config(model__num_layers=9, model__window=9, data__seed=1, training__seed=1, data__shuffle_shards=1))
    with pytest.raises(CheckpointError, match=r"num_layers=9 .*window=9 .*data\.shuffle_shards=1 .* and 2 more; give"):
        check_identity(SAVED, now, "runs/run")


def test_a_key_that_only_one_of_the_two_has_is_a_difference() -> None:
    older = copy.copy(SAVED)
    del older["model.conv_kernel"]
    with pytest.raises(CheckpointError, match=r"model\.conv_kernel=4 \(it was None\)"):
        check_identity(older, SAVED, "runs/run")
    with pytest.raises(CheckpointError, match=r"model\.conv_kernel=None \(it was 4\)"):
        check_identity(SAVED, older, "runs/run")


def test_an_evaluation_needs_the_same_model_and_nothing_else() -> None:
    check_model(SAVED, config(data__seed=1, data__sequence_length=512, training__global_batch_size=64))
    with pytest.raises(CheckpointError, match=r"model\.hidden_size=64 \(it was 192\)"):
        check_model(SAVED, config(model__hidden_size=64))


def test_a_checkpoint_of_another_chunk_size_is_refused_in_one_sentence() -> None:
    for check in (
        lambda: check_identity(SAVED, identity(config(model__memory__chunk_size=16)), "runs/run"),
        lambda: check_model(SAVED, config(model__memory__chunk_size=16)),
    ):
        with pytest.raises(CheckpointError, match=r"model\.memory\.chunk_size=16 \(it was 64\)") as caught:
            check()
        assert "\n" not in str(caught.value)
