"""What a run leaves in its folder can be read by people, and loaded again."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from titans_dist.config import Config, ConfigError, DataConfig, MemoryConfig, ModelConfig, ParallelConfig
from titans_dist.run.folder import read_config, read_status, write_config, write_status


def test_config_yaml_is_the_whole_configuration(tmp_path: Path) -> None:
    config = Config(
        name="a name",
        run_dir=str(tmp_path / "runs" / "x"),
        model=ModelConfig(norm_eps=1e-7, intermediate_size=None, memory=MemoryConfig(theta_max=0.25)),
        parallel=ParallelConfig(tensor=2, data=None),
        data=DataConfig(format="text", path="data/x", source="~/texts: all"),
    )
    write_config(config)
    text = (tmp_path / "runs" / "x" / "config.yaml").read_text()
    loaded = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(text)))
    assert loaded == config
    assert "  num_layers: 4\n" in text  # defaults too
    assert read_config(tmp_path / "runs" / "x") == config


def test_a_configuration_of_an_older_version_has_new_keys_at_their_defaults(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "name: x\nrun_dir: y\nmodel: {num_layers: 7}\ndata: {format: text, path: z}\n"
    )
    assert read_config(tmp_path) == Config(
        name="x", run_dir="y", model=ModelConfig(num_layers=7), data=DataConfig(format="text", path="z")
    )


@pytest.mark.parametrize("text", ["unknown: 1\n", "name: [\n", "model: {num_layers: many}\n", "- a list\n"])
def test_another_file_is_no_configuration(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config.yaml is not the configuration of a run \("):
        read_config(tmp_path)


def test_a_folder_without_a_configuration_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config.yaml, so it is no run that was trained; "):
        read_config(tmp_path / "none")


@pytest.mark.parametrize("status", ["running", "interrupted", "done"])
def test_the_status_is_one_word(tmp_path: Path, status: str) -> None:
    config = Config(name="x", run_dir=str(tmp_path))
    write_status(config, "something longer than any of them")
    write_status(config, status)
    assert (tmp_path / "STATUS").read_text() == f"{status}\n"
    assert read_status(tmp_path) == status


def test_a_run_that_has_not_begun_has_no_status(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
