"""`titans-dist evaluate --follow RUN`: measure the checkpoints of a run while it is trained."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from titans_dist.config import Config, ConfigError, validate
from titans_launch import app, names, tables

OWN = ("name", "run_dir", "evaluation")
"""What is the follower's, not the run's."""


def run(config: Config) -> int:
    """Follow until the run is done or nothing comes any more."""
    from titans_dist.evaluation.follow import Follower
    from titans_dist.run.folder import read_config

    settings = config.evaluation
    if not settings.tasks:
        raise ConfigError("--follow has nothing to measure; add a suite, such as suite=offline, or evaluation.tasks")
    run = read_config(Path(config.run_dir))
    followed = merged(run, config)
    os.nice(settings.follow.nice)
    share = f"{settings.gpus:g} GPUs" if settings.gpus else f"{settings.cpus:g} CPU cores"
    print(
        f"following {tables.place(config.run_dir)} | {settings.workers} workers of {share} at nice "
        f"{settings.follow.nice} | at most {settings.follow.budget:.0%} of the time while it is trained",
        flush=True,
    )
    Follower(followed, run, lambda line: print(line, flush=True)).follow()
    return 0


def merged(run: Config, config: Config) -> Config:
    """The run as it was started, with what the command line changes, and its own `evaluation`.

    Raises CheckpointError where the command line says another model than the run's.
    """
    from titans_dist.run.identity import check_model, flatten, identity

    plain = app.typed(hydra.compose(HydraConfig.get().job.config_name, [f"name={names.quote(config.name)}"]))
    before, after = (flatten(dataclasses.asdict(each)) for each in (plain, config))
    changed: dict[str, Any] = {
        key: value
        for key, value in after.items()
        if key.partition(".")[0] not in OWN and (key not in before or before[key] != value)
    }
    found = OmegaConf.structured(run)
    for key, value in changed.items():
        OmegaConf.update(found, key, value)
    made = OmegaConf.to_object(found)
    assert isinstance(made, Config)
    made = dataclasses.replace(made, name=config.name, run_dir=config.run_dir, evaluation=config.evaluation)
    check_model(identity(run), made)
    validate(made)
    return made
