"""The model's configuration: what is left unset is worked out, what cannot be meant is refused."""

from __future__ import annotations

import dataclasses

import pytest

from titans_dist.config import ConfigError, MemoryConfig, ModelConfig
from titans_dist.config.architecture import validate_model
from titans_dist.config.model import RECURRENT_VARIANTS, VARIANTS
from titans_dist.config.presets import PRESETS
from titans_dist.memory import MemorySpec


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_the_memory_of_that_name(preset: str) -> None:
    config = ModelConfig(variant="lmm", memory=MemoryConfig(preset=preset))
    validate_model(config)
    spec = MemorySpec(**config.memory.spec_fields())
    assert spec == MemorySpec.preset(preset)
    # The fields a preset does not name are known here too, without torch.
    for item in dataclasses.fields(MemorySpec):
        if item.name in (
            "depth",
            "expansion",
            "residual",
            "bias",
            "retention",
            "momentum",
            "anchor",
            "decay",
            "implicit",
        ):
            assert config.memory.choice(item.name) == getattr(spec, item.name), item.name


def test_what_is_set_stands_before_the_preset() -> None:
    memory = MemoryConfig(preset="moneta", depth=3, activation="silu", residual=False, p=2.5, q=6.0, channel_wise=False)
    spec = MemorySpec(**memory.spec_fields())
    assert spec == MemorySpec.preset("moneta", depth=3, activation="silu", residual=False, p=2.5, q=6.0)
    assert memory.choice("depth") == 3


def test_false_and_zero_are_set() -> None:
    memory = MemoryConfig(preset="titans", momentum=False, retention="elastic_net", threshold=0.0)
    fields = memory.spec_fields()
    assert (fields["momentum"], fields["threshold"]) == (False, 0.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_memory_without_a_name_is_the_variant_s_own(variant: str) -> None:
    config = ModelConfig(variant=variant)
    assert config.memory.preset == (variant if variant in RECURRENT_VARIANTS else "titans")
    validate_model(config)
    assert config.has_memory == (variant not in ("transformer", "swa"))


def test_a_dict_is_a_memory() -> None:
    given = {"preset": "yaad", "chunk_size": 16}
    assert ModelConfig(memory=given) == ModelConfig(memory=MemoryConfig(preset="yaad", chunk_size=16))  # type: ignore[arg-type]
    own = ModelConfig(variant="deltanet", memory={"chunk_size": 16})  # type: ignore[arg-type]
    assert own.memory == MemoryConfig(preset="deltanet", chunk_size=16)


@pytest.mark.parametrize(
    ("memory", "sentence"),
    [
        ({"chunksize": 16}, "memory has no field chunksize; did you mean chunk_size?"),
        ({"xyz": 1}, "memory has no field xyz; choose from preset, depth, "),
        (3, "memory is a int; give a MemoryConfig or a dict of its fields"),
    ],
)
def test_another_dict_is_refused(memory: object, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig(memory=memory)  # type: ignore[arg-type]
    assert str(error.value).startswith(sentence)


def test_a_config_is_never_changed_by_the_model_made_of_it() -> None:
    memory = MemoryConfig(chunk_size=8)
    ModelConfig(variant="mamba2", memory=memory)
    assert memory.preset is None


@pytest.mark.parametrize("hidden", [64, 192, 320])
def test_the_mlp_is_8_3_of_the_width_unless_something_else_decides(hidden: int) -> None:
    width = ModelConfig(hidden_size=hidden).mlp_size
    assert width % 64 == 0
    assert 0 <= width - 8 * hidden / 3 < 64
    assert ModelConfig(hidden_size=hidden, intermediate_size=72, parameters=10**7).mlp_size == 72
