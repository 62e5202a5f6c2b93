"""Every value that cannot work is refused in one sentence: the key, the value, and one that works."""

from __future__ import annotations

import dataclasses
import itertools
import math
import types
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titans_dist.config import Config, ConfigError, DataConfig, MemoryConfig, ModelConfig, validate
from titans_dist.config.architecture import validate_model
from titans_dist.config.checks import nearest_divisor, nearest_multiple
from titans_dist.config.presets import PRESETS
from titans_dist.config.sizes import smallest
from titans_dist.memory import MemorySpec


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


TNT = {"model__variant": "lmm", "model__memory__global_chunk_size": 128}
TOKEN = {"model__memory__anchor": "token"}
MATRIX = {"model__memory__preset": "deltanet"}
SMALLEST = smallest(ModelConfig())

NUMBERS = [key for key, kinds in leaves() if kinds & {int, float}]
WORDS = [key for key, kinds in leaves() if str in kinds]
FREE_NUMBERS = {"data__seed", "training__seed"}
FREE_WORDS = {"name", "run_dir", "data__source", "data__text_column", "data__path", "data__tokenizer"}
FREE_WORDS |= {"data__cache", "tracking__project", "tracking__entity", "conformance__target", "inspect__output"}
FREE_WORDS |= {"checkpoint__mirror", "export__path", "plan__gpu", "plan__picture"}
FREE_WORDS |= {f"evaluation__{key}" for key in ("text", "babi", "task_folder", "address")}
# What the scheduler knows; sizes and times have sentences of their own (test_machines).
FREE_WORDS |= {f"cluster__{key}" for key in ("memory", "time", "queue", "account", "image")}
FREE_WORDS |= {key for key in WORDS if key.startswith(("cluster__kubernetes__", "cluster__slurm__"))}
FREE_WORDS -= {"cluster__slurm__launcher", "cluster__slurm__container"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__variant": "mac2"}, "model.variant=mac2 is unknown; choose one of lmm, mac, mag, mal, transf"),
        ({"model__memory__activation": "tanh"}, "choose one of gelu, silu, relu, identity"),
        ({"model__memory__backend": "fast"}, "backend=fast is unknown; choose one of auto, triton, torch, compiled"),
        ({"model__memory__read": "during"}, "choose one of after, before"),
        ({"model__memory__depth": 5}, "model.memory.depth=5 is out of range; use 1 to 4"),
        (
            {"model__memory__preset": "titan"},
            "model.memory.preset=titan is unknown; choose one of titans, moneta, yaad",
        ),
        ({"model__memory__bias": "l3"}, "model.memory.bias=l3 is unknown; choose one of l2, dot, l1, lp, huber"),
        ({"model__memory__retention": "l1"}, "choose one of none, l2, lq, lq_paper, kl, elastic_net"),
        ({"model__memory__anchor": "start"}, "model.memory.anchor=start is unknown; choose one of chunk, token"),
        ({"model__memory__q": 1.5}, "model.memory.q=1.5 is too small; use 2 or more"),
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
        ({"checkpoint__keep": 1}, "checkpoint.keep=1 is too small; use 2 or more"),
        ({"inspect__step": 0}, "inspect.step=0 is too small; use 1 or more"),
        ({"inspect__step": 7, "inspect__to_step": 6}, "inspect.to_step=6 is too small; use 7 or more"),
        ({"inspect__rank": 2, "inspect__ranks": 2}, "inspect.rank=2 is not one of 2 ranks; use 0 to 1, or more"),
        ({"inspect__rank": 1}, "inspect.rank=1 is not one of 1 ranks; use 0, or more inspect.ranks"),
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
        (
            {
                "model__variant": "mac",
                "model__segment_length": 66,
                "model__memory__chunk_size": 2,
                "parallel__tensor": 4,
            },
            "model__segment_length",
            64,
        ),
        (
            {"model__variant": "mal", "model__persistent_tokens": 7, "parallel__tensor": 4},
            "model__persistent_tokens",
            8,
        ),
        ({"model__variant": "mac", "model__segment_length": 100}, "model__segment_length", 128),
        ({"model__variant": "mac", "model__segment_length": 10}, "model__segment_length", 64),
        (TNT | {"model__memory__shard_size": 100}, "model__memory__shard_size", 128),
        (TNT | {"model__memory__global_chunk_size": 70}, "model__memory__global_chunk_size", 64),
        (TNT | {"model__variant": "mac"}, "model__variant", "lmm"),
        ({"model__variant": "mamba2"}, "model__memory__preset", "mamba2"),
        ({"model__parameters": 1_000_000}, "model__parameters", SMALLEST),
        (MATRIX | {"model__memory__depth": 2}, "model__memory__anchor", "chunk"),
        (TOKEN | {"model__memory__chunk_size": 4}, "model__memory__chunk_size", 1),
        (TOKEN | {"model__memory__chunk_size": 1, "model__memory__retention": "lq"}, "model__memory__retention", "l2"),
        ({"model__memory__retention": "kl", "model__memory__channel_wise": True}, "model__memory__retention", "l2"),
        ({"model__memory__depth": 3, "model__memory__channel_wise": True}, "model__memory__depth", 2),
        ({"training__global_batch_size": 24}, "training__global_batch_size", 32),
        ({"training__global_batch_size": 16, "parallel__data": 2}, "training__global_batch_size", 32),
        ({"inspect__ranks": 7}, "inspect__ranks", 8),
    ],
)
def test_the_value_the_sentence_proposes_works(changes: dict[str, Any], key: str, legal: Any) -> None:
    config = put(good(), **changes)
    with pytest.raises(ConfigError) as error:
        validate(config)
    message = str(error.value)
    assert key.replace("__", ".") in message
    assert str(changes.get(key, "")) in message
    assert str(legal) in message
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


@pytest.mark.parametrize(
    "changes",
    [
        {"model__memory__preset": "gated_deltanet", "model__memory__anchor": "chunk"},
        {"model__memory__preset": "longhorn", "model__memory__anchor": "chunk"},
        {"model__memory__preset": "longhorn", "model__memory__momentum": True},
    ],
    ids=str,
)
def test_what_defines_a_preset_cannot_be_taken_from_it(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"preset=\w+.* defined .*; leave .* out or choose another preset"):
        validate(put(good(), **changes))


@pytest.mark.parametrize("variant", ["transformer", "swa"])
def test_without_a_memory_its_choices_need_not_go_together(variant: str) -> None:
    validate(put(good(), model__variant=variant, **TOKEN))
    with pytest.raises(ConfigError, match="anchor=token"):
        validate(put(good(), model__variant="mag", **TOKEN))


def test_whatever_memory_passes_can_be_made() -> None:
    """Every pair of choices that MemorySpec refuses is refused here, where the message has the configuration's keys."""
    choices: dict[str, list[Any]] = {
        "preset": list(PRESETS),
        "depth": [None, 1, 2, 3],
        "residual": [None, True, False],
        "bias": [None, "dot", "huber"],
        "retention": [None, "none", "l2", "kl"],
        "momentum": [None, True],
        "anchor": [None, "chunk", "token"],
        "channel_wise": [False, True],
        "chunk_size": [1, 4],
    }
    passed = refused = 0
    for values in itertools.product(*choices.values()):
        memory = MemoryConfig(**dict(zip(choices, values, strict=True)))
        try:
            validate_model(ModelConfig(variant="lmm", memory=memory))
        except ConfigError:
            refused += 1
            continue
        spec = MemorySpec(**memory.spec_fields())
        assert memory.chunk_size == 1 or spec.has_chunked_form, memory
        passed += 1
    assert min(passed, refused) > 1000


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
