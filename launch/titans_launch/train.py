"""`titans-dist train`: the launcher (of the first node) prepares the data and starts workers; a worker trains."""

from __future__ import annotations

from pathlib import Path

from titans_dist.config import Config
from titans_launch import failures, local, prepare, worker


def run(config: Config) -> int:
    """Train, as a worker or as the launcher of workers on this machine."""
    if not worker.is_worker():
        node = local.join("train", config)
        if node is None or node.rank == 0:
            prepare.ensure(config.data)
        return local.launch("train", config, is_training=True)
    worker.enter(Path(config.run_dir), "train")
    from titans_dist import training
    from titans_dist.parallel import peers

    peers.last_words = failures.say
    training.train(config)
    return 0
