"""The datasets of the configuration, opened as `train` opens them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from titans_dist.checkpoint.store import Store
from titans_dist.config import CheckpointError, Config
from titans_dist.run.data import TrainingData, dataset_paths, left_out, open_training
from titans_dist.run.identity import check_identity, identity


@dataclasses.dataclass(frozen=True)
class Read:
    """What a run has read and will read."""

    data: TrainingData
    checkpoint: int | None
    """The step of the newest checkpoint, if there is one."""
    health: dict[str, Any]
    """Its state of `health`, which knows of data that was left out."""

    def index(self, step: int) -> int:
        """Where in the order of the data `step`, counted from 1, reads; from 0."""
        return step - 1 + left_out(self.health, step)


def training_data(config: Config) -> Read:
    """The rows and their order, as of the run's newest checkpoint, if there is one.

    Raises CheckpointError where the run folder holds a run with another order of the data.
    """
    store = Store(Path(config.run_dir) / "checkpoints")
    step = newest(store)
    meta = {} if step is None else store.meta(step)
    if meta:
        # How the model is computed says nothing of the data.
        saved, now = (
            {key: value for key, value in each.items() if not key.startswith("model.")}
            for each in (meta["identity"], identity(config))
        )
        check_identity(saved, now, config.run_dir)
    return Read(open_training(config, meta.get("data")), step, meta.get("health") or {})


def newest(store: Store) -> int | None:
    """The newest step whose files are all there; their contents, which may be huge, are not read."""
    for step in reversed(store.committed()):
        try:
            store.verify(step, digests=False)
        except (CheckpointError, OSError):
            continue
        return step
    return None


def described(config: Config, path: str) -> Path:
    """A local folder with the card and the tokenizer of a dataset: its own, or a copy in the cache for an address."""
    from titans_data.files import local_folder

    return local_folder(path, config.data.cache, cache_bytes(config))


def cache_bytes(config: Config) -> int:
    """Upper bound on the size of the cache."""
    return int(config.data.cache_gb * 1e9)


def ranks(config: Config) -> int:
    """How many data-parallel ranks share the global batch."""
    return config.inspect.ranks or config.parallel.data or 1


def said(config: Config, read: Read) -> None:
    """Print from where the order goes on, if not from the start."""
    if (step := read.checkpoint) is not None:
        edited = f"; the mixture is another one from step {step + 1:,} on" if read.data.is_edited else ""
        count = left_out(read.health, step + 1)
        passed = f"; the data of {count:,} steps was left out by going back" if count else ""
        print(f"as {Path(config.run_dir).name} has read up to step {step:,}{passed}{edited}")


def names(config: Config) -> list[str]:
    """The names of the sources that are configured."""
    return list(dataset_paths(config)) or ["main"]


def label(config: Config, source: str) -> str:
    """How a person calls a source: by its name in a mixture and its place."""
    path = dataset_paths(config).get(source) or config.data.path or config.data.format
    return path if source == "main" else f"{source}: {path}"
