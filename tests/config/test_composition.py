"""The files of configs/: each composes, each says only what the schema knows."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

import titans_dist
from titans_dist.config import Config, ConfigError, validate
from titans_dist.config.model import RECURRENT_VARIANTS, VARIANTS
from titans_dist.config.presets import PRESETS

CONFIGS = Path(titans_dist.__file__).parent / "configs"
FILES = sorted(path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml"))
GROUPS = sorted({str(path.parent) for path in FILES} - {"."})


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def composed(*overrides: str) -> Config:
    """The typed configuration, with the values only a running Hydra job knows filled in."""
    ConfigStore.instance().store("schema", Config)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("config", ["name=demo", "run_dir=runs/demo", *overrides])
    result = OmegaConf.to_object(config)
    assert isinstance(result, Config)
    return result


def section(file: Path) -> str:
    """The part of the schema a file fills: its group, unless it says otherwise in its first lines."""
    for line in (CONFIGS / file).read_text().splitlines():
        if line.startswith("# @package "):
            package = line.removeprefix("# @package ").strip()
            return "" if package == "_global_" else package
    return "" if file.parent == Path() else str(file.parent)


def fields(kind: type, dotted: str) -> dict[str, typing.Any]:
    for name in filter(None, dotted.split(".")):
        kind = typing.get_type_hints(kind)[name]
    return typing.get_type_hints(kind)


def unknown(content: dict[str, typing.Any], known: dict[str, typing.Any]) -> list[str]:
    found = [key for key in content if key not in known]
    for key, value in content.items():
        if isinstance(value, dict) and dataclasses.is_dataclass(known.get(key)):
            found += unknown(value, typing.get_type_hints(known[key]))
    return found


def test_the_defaults_are_the_quickstart() -> None:
    config = composed()
    validate(config)
    assert (config.parallel.tensor, config.data.format, config.training.steps) == (2, "stdlib", 200)


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_composes_and_is_valid_on_its_own_layout(name: str) -> None:
    validate(composed(f"experiment={name}"))


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_key_of_a_file_is_in_the_schema(file: Path) -> None:
    content = yaml.safe_load((CONFIGS / file).read_text())
    for key in ("defaults", "hydra"):
        content.pop(key, None)
    assert unknown(content, fields(Config, section(file))) == []


@pytest.mark.parametrize("name", options("model"))
def test_every_model_is_valid(name: str) -> None:
    config = composed(f"model={name}")
    validate(config)
    assert config.model.head_dim % 2 == 0


# What a file cannot know: where the user's corpus is; and TNT is a memory of one variant.
NEEDS = {
    "data": ["data.source=corpus", "data.path=data/x"],
    "data=mixture": ["+data.sources.web=data/web"],
    "memory=tnt": ["variant=lmm"],
}


@pytest.mark.parametrize(
    ("group", "name"),
    [
        (group, name)
        for group in sorted({*GROUPS} - {"model", "experiment", "parallel", "variant"})
        for name in options(group)
    ],
)
def test_every_other_option_is_valid_with_the_default_model(group: str, name: str) -> None:
    validate(composed(f"{group}={name}", *NEEDS.get(group, []), *NEEDS.get(f"{group}={name}", [])))


@pytest.mark.parametrize("name", options("parallel"))
def test_every_layout_is_valid_with_a_model_that_has_heads_for_it(name: str) -> None:
    validate(composed(f"parallel={name}", "model=1b3"))


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_is_in_the_defaults(group: str) -> None:
    defaults = yaml.safe_load((CONFIGS / "config.yaml").read_text())["defaults"]
    assert group in {key for item in defaults if isinstance(item, dict) for key in item}


@pytest.mark.parametrize("name", options("variant"))
def test_a_variant_s_file_makes_that_variant(name: str) -> None:
    config = composed(f"variant={name}").model
    assert config.variant == name
    if name in RECURRENT_VARIANTS:
        assert config.memory == composed("variant=lmm", f"memory={name}").model.memory
    paper_has_them = name in ("lmm", "mac", "mag", "mal")
    assert (config.persistent_tokens > 0) == paper_has_them


@pytest.mark.parametrize("name", sorted({*options("memory")} - {"tnt"}))
def test_a_memory_s_file_makes_that_memory(name: str) -> None:
    assert composed(f"memory={name}").model.memory.preset == name


def test_every_preset_and_variant_has_a_file() -> None:
    assert {*options("memory")} == {*PRESETS, "tnt"}
    assert {*options("variant")} == {*VARIANTS}


def test_an_experiment_takes_another_variant_and_memory() -> None:
    mac = composed("experiment=titans_340m", "variant=mac", "memory=moneta").model
    assert (mac.variant, mac.memory.preset, mac.num_layers) == ("mac", "moneta", 24)
    assert composed("experiment=titans_340m", "variant=gated_deltanet").model.memory.preset == "gated_deltanet"


def test_a_memory_chosen_against_the_variant_s_own_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gated_deltanet has the memory of its name, not .*=moneta; use "):
        validate(composed("variant=gated_deltanet", "memory=moneta"))


def test_null_and_numbers_reach_optional_fields() -> None:
    assert composed("parallel.data=null").parallel.data is None
    assert composed("parallel.data=4").parallel.data == 4
    assert composed("model.memory.theta_max=0.5").model.memory.theta_max == 0.5


def test_the_run_folder_is_no_timestamp() -> None:
    hydra = yaml.safe_load((CONFIGS / "config.yaml").read_text())["hydra"]
    assert hydra["run"]["dir"] == "runs/${name}"
    assert "now" not in str(hydra)
