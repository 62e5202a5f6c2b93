"""What a run leaves in its folder beside metrics, checkpoints and logs."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from titans_dist.config import Config


def write_config(config: Config) -> None:
    """Write the whole configuration to config.yaml in the run folder."""
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def write_status(config: Config, status: str) -> None:
    """Write running, interrupted or done to STATUS in the run folder."""
    (Path(config.run_dir) / "STATUS").write_text(status + "\n")
