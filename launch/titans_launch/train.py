"""`titans-dist train`: the launcher prepares the data and starts the workers; a worker trains."""

from __future__ import annotations

from pathlib import Path

from titans_dist.config import Config
from titans_launch import local, prepare, worker


def run(config: Config) -> int:
    """Train, as a worker or as the launcher of workers on this machine."""
    if not worker.is_worker():
        prepare.ensure(config.data)
        return local.launch("train", config)
    worker.redirect(Path(config.run_dir), "train")
    from titans_dist import training

    training.train(config)
    return 0
