"""`titans-dist checkpoint import`: a run that begins with the weights of an export."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from titans_dist.config import Config, ConfigError, ParallelConfig
from titans_launch import tables, worker


def run(config: Config) -> None:
    """Import in this process alone, or as one of the workers that torchrun has started."""
    if config.export.format != "hf":
        raise ConfigError(
            f"export.format={config.export.format} is none that checkpoint import reads; use hf, or titans-dist "
            "checkpoint convert"
        )
    with warnings.catch_warnings(action="ignore"):  # megatron-core's, of what it misses
        from titans_dist.export import read_export

    if worker.is_worker():
        worker.enter(Path(config.run_dir), "checkpoint-import")
        folder = read_export(config)
    else:
        with _world_of_one():
            folder = read_export(_alone(config))
    if not worker.is_worker() or worker.rank() == 0:
        print(f"{tables.place(folder)} has the weights of {tables.place(Path(config.export.path or ''))}")


def _alone(config: Config) -> Config:
    """The configuration for one process on the CPU, which needs no memory on a GPU; checkpoints fit every layout."""
    training = dataclasses.replace(config.training, engine="megatron", device="cpu")
    return dataclasses.replace(config, parallel=ParallelConfig(data=1), training=training)


@contextlib.contextmanager
def _world_of_one() -> Iterator[None]:
    """For the block, what torchrun would tell a process that is alone; port 0 is any that is free."""
    told = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    before = dict(os.environ)
    os.environ.update(told)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
