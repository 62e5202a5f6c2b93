"""What starts a job: Slurm, Kubernetes or this machine, from one description (`cluster` in the configuration)."""

from __future__ import annotations

import importlib

from titans_launch.schedulers.job import Scheduler

_MODULES = {"slurm": "slurm", "jobset": "kubernetes", "trainjob": "kubernetes", "local": "here"}


def named(backend: str) -> Scheduler:
    """The scheduler of `cluster.backend`; its module is imported now."""
    module = importlib.import_module(f"titans_launch.schedulers.{_MODULES[backend]}")
    scheduler: Scheduler = module.scheduler(backend)
    return scheduler
