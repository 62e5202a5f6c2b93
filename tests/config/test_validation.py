"""Every value that cannot work is refused in one sentence: the key, the value, and one that works."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titans_dist.config import Config, ConfigError, DataConfig, validate
from titans_dist.config.validate import nearest_divisor, nearest_multiple


def good() -> Config:
    """A configuration that works, small enough to reason about."""
    config = Config(name="demo", run_dir="runs/demo", data=DataConfig(format="stdlib", path="data/x"))
    validate(config)
    return config


def put(config: Config, **changes: Any) -> Config:
    """Set keys such as model__memory__depth=3."""
    for key, value in changes.items():
        *path, last = key.split("__")
        node: Any = config
        for name in path:
            node = getattr(node, name)
        setattr(node, last, value)
    return config


def leaves(kind: type = Config, prefix: str = "") -> Iterator[tuple[str, set[Any]]]:
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from leaves(typing.cast(type, hint), f"{prefix}{name}__")
        else:
            yield f"{prefix}{name}", set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}


NUMBERS = [key for key, kinds in leaves() if kinds & {int, float}]
WORDS = [key for key, kinds in leaves() if str in kinds]
FREE_NUMBERS = {"data__seed", "training__seed"}
FREE_WORDS = {"name", "run_dir", "data__source", "data__text_column", "data__path", "data__tokenizer"}
FREE_WORDS |= {"tracking__project", "tracking__entity"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__variant": "mac"}, "model.variant=mac is unknown; choose one of mag"),
        ({"model__memory__activation": "tanh"}, "choose one of gelu, silu, relu, identity"),
        ({"model__memory__read": "during"}, "choose one of after, before"),
        ({"model__memory__depth": 5}, "model.memory.depth=5 is out of range; use 1 to 4"),
        ({"model__num_layers": 0}, "model.num_layers=0 is too small; use 1 or more"),
        ({"model__persistent_tokens": -1}, "model.persistent_tokens=-1 is too small; use 0 or more"),
        ({"model__norm_eps": 0.0}, "model.norm_eps=0.0 must be a finite number above 0"),
        ({"data__format": "csv"}, "data.format=csv is unknown; choose one of stdlib, text, jsonl, parquet"),
        ({"data__dtype": "int64"}, "data.dtype=int64 is unknown; choose one of uint16, uint32"),
        ({"data__format": "text"}, "data=text needs to know the corpus; add data.source=PATH"),
        ({"data__validation_fraction": 0.5}, "use a share above 0 and below 0.5, such as 0.01"),
        ({"optimizer__beta1": 1.0}, "optimizer.beta1=1.0 is no decay; use a number from 0 to below 1, such as 0.95"),
        ({"optimizer__min_lr_ratio": 1.5}, "optimizer.min_lr_ratio=1.5 is out of range; use 0 to 1"),
        ({"training__precision": "fp8"}, "training.precision=fp8 is unknown; choose one of float32, bfloat16"),
        ({"training__device": "tpu"}, "training.device=tpu is unknown; choose one of auto, cuda, cpu"),
        ({"training__keep_checkpoints": 1}, "training.keep_checkpoints=1 is too small; use 2 or more"),
    ],
)
def test_the_sentence_names_key_value_and_mend(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(put(good(), **changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("changes", "key", "legal"),
    [
        ({"model__hidden_size": 190}, "model__hidden_size", 192),
        ({"model__num_heads": 64, "model__hidden_size": 192}, "model__hidden_size", 256),
        ({"parallel__tensor": 3}, "parallel__tensor", 2),
        ({"parallel__tensor": 8}, "parallel__tensor", 4),
        ({"parallel__tensor": 4, "data__sequence_length": 255}, "data__sequence_length", 256),
        ({"training__global_batch_size": 24}, "training__global_batch_size", 32),
        ({"training__global_batch_size": 16, "parallel__data": 2}, "training__global_batch_size", 32),
    ],
)
def test_the_value_the_sentence_proposes_works(changes: dict[str, Any], key: str, legal: int) -> None:
    config = put(good(), **changes)
    with pytest.raises(ConfigError) as error:
        validate(config)
    message = str(error.value)
    assert key.replace("__", ".") in message
    assert str(changes.get(key, "")) in message
    assert str(legal) in message or f"fewer than {legal + 1}" in message
    validate(put(config, **{key: legal}))


@pytest.mark.parametrize("key", sorted(set(NUMBERS) - FREE_NUMBERS))
@pytest.mark.parametrize("value", [-1, math.nan])
def test_no_number_goes_unchecked(key: str, value: float) -> None:
    with pytest.raises(ConfigError) as error:
        validate(put(good(), **{key: value}))
    assert f"{key.replace('__', '.')}={value}" in str(error.value)


@pytest.mark.parametrize("key", sorted(set(WORDS) - FREE_WORDS))
def test_no_choice_goes_unchecked(key: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(put(good(), **{key: "nonsense"}))
    assert f"{key.replace('__', '.')}=nonsense is unknown; choose one of " in str(error.value)


def test_sequence_length_may_be_odd_where_it_is_not_split() -> None:
    validate(put(good(), parallel__tensor=2, parallel__sequence=False, data__sequence_length=255))


def test_optional_numbers_may_be_unset() -> None:
    validate(put(good(), model__intermediate_size=None, model__memory__theta_max=None, parallel__data=None))


@given(st.integers(1, 5000), st.integers(1, 200))
def test_nearest_divisor_divides_and_none_is_nearer(value: int, wanted: int) -> None:
    found = nearest_divisor(value, wanted)
    assert value % found == 0
    assert not [d for d in range(1, value + 1) if value % d == 0 and abs(d - wanted) < abs(found - wanted)]


@given(st.integers(1, 5000), st.integers(1, 200))
def test_nearest_multiple_is_a_positive_multiple_and_none_is_nearer(value: int, step: int) -> None:
    found = nearest_multiple(value, step)
    assert found % step == 0
    assert found >= step
    assert abs(found - value) <= step / 2 or found == step
