"""`titans-dist checkpoint verify`: every file of the checkpoints against the sha256 in its manifest."""

from __future__ import annotations

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from titans_dist.checkpoint.store import Store
from titans_dist.config import CheckpointError, Config
from titans_launch import tables
from titans_launch.checkpoint import opened
from titans_launch.data.verify import Meter

THREADS = 8


def run(config: Config) -> None:
    """Check all checkpoints or one, then complain of all bad files together."""
    store, wanted = opened.store(config), config.inspect.step
    steps = store.committed() if wanted is None else [opened.step(store, wanted)]
    bad: list[str] = []
    # A folder without a readable manifest is what a flipped bit in the manifest leaves. Nothing goes on from it.
    for path in store.leftovers() if wanted is None else []:
        is_cut_short = path.suffix == ".tmp"
        problem = "the leftover of a save that did not end; it is ignored" if is_cut_short else "no readable manifest"
        tables.show(tables.place(path), [("problem", problem)])
        bad += [] if is_cut_short else [tables.place(path)]
    for step in steps:
        bad += verify(store, step)
    if bad:
        are = "1 file is" if len(bad) == 1 else f"{len(bad)} files are"
        raise CheckpointError(
            f"{are} not what the manifest says: {', '.join(bad)}; a start of this run passes such a checkpoint over "
            "and goes on from the one before it"
        )
    if not steps:
        raise CheckpointError(f"{tables.place(store.root)} has no checkpoint to verify")


def verify(store: Store, step: int) -> list[str]:
    """Check one checkpoint, print a table, and return its bad files."""
    folder, files = store.folder(step), store.manifest(step)["files"]
    size_bytes = sum(entry["size"] for entry in files.values())
    started = time.monotonic()
    bad: dict[str, str] = {}
    with Meter(tables.place(folder), size_bytes) as meter, ThreadPoolExecutor(THREADS) as pool:
        problems = pool.map(lambda name: problem(folder / name, files[name]), files)
        for name, found in zip(files, problems, strict=True):
            meter.add(files[name]["size"])
            if found is not None:
                bad[tables.place(folder / name)] = found
    seconds = max(time.monotonic() - started, 1e-9)
    tables.show(
        tables.place(folder),
        [
            ("files", f"{len(files):,} checked, {len(bad):,} bad"),
            ("bytes", f"{size_bytes:,} in {seconds:.1f} s, {size_bytes / seconds / 1e6:,.1f} MB/s"),
            *bad.items(),
        ],
    )
    return list(bad)


def problem(path: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with a file, or None."""
    try:
        if (size_bytes := path.stat().st_size) != entry["size"]:
            return f"has {size_bytes:,} bytes instead of {entry['size']:,}"
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if digest == entry["sha256"] else "does not have the sha256 in the manifest"
