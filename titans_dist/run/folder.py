"""What a run leaves in its folder beside metrics, checkpoints and logs."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from titans_dist.config import Config, ConfigError

CONFIG, STATUS = "config.yaml", "STATUS"


def write_config(config: Config) -> None:
    """Write the whole configuration to config.yaml in the run folder."""
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def read_config(folder: Path) -> Config:
    """What `write_config` has written; keys that are new since then have their defaults.

    Raises ConfigError where there is none, or none of this program.
    """
    path = folder / CONFIG
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path)))
    except OSError:
        raise ConfigError(
            f"{folder} has no {CONFIG}, so it is no run that was trained; give the name of one that was, or train it "
            "first"
        ) from None
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not the configuration of a run ({' '.join(str(error).split())[:200]})") from None
    assert isinstance(config, Config)
    return config


def write_status(config: Config, status: str) -> None:
    """Write running, interrupted or done to STATUS in the run folder."""
    (Path(config.run_dir) / STATUS).write_text(status + "\n")


def read_status(folder: Path) -> str | None:
    """The word in STATUS; None where there is none, also in the moment in which it is written."""
    try:
        return (folder / STATUS).read_text().strip() or None
    except OSError:
        return None
