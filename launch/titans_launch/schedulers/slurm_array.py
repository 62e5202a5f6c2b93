"""The tasks of an array, each of which trains a run of its own with overrides of its own."""

from __future__ import annotations

import shlex

from hydra import compose
from hydra.core.hydra_config import HydraConfig

from titans_dist.config import Config, ConfigError
from titans_dist.config.machines import check_processes
from titans_launch import app, explain
from titans_launch.schedulers.job import Job


def check(job: Job) -> None:
    """Raise ConfigError for the first task whose configuration could not be trained."""
    for number, overrides in enumerate(job.config.submit.array):
        try:
            check_processes(_composed(words(overrides)))
        except explain.COMPOSITION_ERRORS as error:
            raise ConfigError(f"task {number} of submit.array, {overrides!r}: {explain.sentence(error)}") from None
        except ConfigError as error:
            raise ConfigError(f"task {number} of submit.array, {overrides!r}: {error}") from None


def words(overrides: str) -> list[str]:
    """The overrides of one task, split as a shell does it. Raises ConfigError for a quote that does not end."""
    try:
        return shlex.split(overrides)
    except ValueError:
        raise ConfigError("it has a quote that does not end; quote it as for a shell") from None


def _composed(more: list[str]) -> Config:
    """The configuration of the running Hydra job with more overrides."""
    hydra = HydraConfig.get()
    return app.typed(compose(hydra.job.config_name or "config", overrides=[*hydra.overrides.task, *more]))
