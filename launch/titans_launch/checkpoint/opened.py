"""The checkpoints of a run, as they lie in its folder; no other process is needed to look at them."""

from __future__ import annotations

from pathlib import Path

from titans_dist.checkpoint.store import Store
from titans_dist.config import CheckpointError, Config
from titans_launch import tables


def store(config: Config) -> Store:
    """The store of the run. Raises CheckpointError where the run folder has none."""
    root = Path(config.run_dir) / "checkpoints"
    if not root.is_dir():
        raise CheckpointError(
            f"{tables.place(config.run_dir)} has no checkpoints; give the name=NAME of a run that has, or the "
            "overrides it was trained with"
        )
    return Store(root)


def step(store: Store, wanted: int | None) -> int:
    """The wanted step, or the newest. Raises CheckpointError, naming those there are, where there is none such."""
    steps = store.committed()
    if wanted is None and steps:
        return steps[-1]
    if wanted is not None and wanted in steps:
        return wanted
    what = "no checkpoint" if wanted is None else f"no checkpoint of step {wanted}"
    there = f"; there is one of step {', '.join(map(str, steps))}" if steps else ""
    raise CheckpointError(f"{tables.place(store.root)} has {what}{there}")


def size(size_bytes: float) -> str:
    """A size as a person reads it, such as 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 999.5:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:,.3g} TB"
