"""What a run leaves in its folder can be read by people, and loaded again."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from titans_dist.config import Config, DataConfig, MemoryConfig, ModelConfig, ParallelConfig
from titans_dist.run.folder import write_config, write_status


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


@pytest.mark.parametrize("status", ["running", "interrupted", "done"])
def test_the_status_is_one_word(tmp_path: Path, status: str) -> None:
    config = Config(name="x", run_dir=str(tmp_path))
    write_status(config, "something longer than any of them")
    write_status(config, status)
    assert (tmp_path / "STATUS").read_text() == f"{status}\n"
