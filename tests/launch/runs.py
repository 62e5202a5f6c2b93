"""Runs with real checkpoints for the tests of the commands that look at them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.launch import command_line
from tests.training.jobs import SINGLE, SIZES, TEXT, Run, corpus, finish
from titans_dist.checkpoint.store import MANIFEST, Store, sealed

OVERRIDES = (*TEXT, *SIZES, *SINGLE)
"""One process, twelve steps, checkpoints after 4, 8 and 12."""
VERSIONS = {"Python": "3.11.1", "torch": "2.12.0"}
"""That the checkpoints say they were made with."""
SAVED = 1.7e9
"""Unix seconds: the checkpoint of step n says that it was saved n seconds later."""


def trained(folder: Path) -> Run:
    """The run `made` in `folder`, of OVERRIDES, and the dataset it has read."""
    corpus(folder / "text")
    prepared = command_line.run("prepare", *TEXT, cwd=folder)
    assert prepared.returncode == 0, prepared.stderr
    finish(folder, "train", *OVERRIDES, "name=made")
    run = Run(folder / "runs" / "made")
    for step in run.store.committed():
        tell(run.store, step, job=run.store.meta(step)["job"] | {"versions": VERSIONS}, time=SAVED + step)
    return run


def copied(run: Run, folder: Path, name: str) -> Run:
    """A copy of a run below `folder`, and of its data."""
    for part in ("text", "data"):
        if not (folder / part).exists():
            shutil.copytree(run.folder.parents[1] / part, folder / part)
    shutil.copytree(run.folder, folder / "runs" / name)
    return Run(folder / "runs" / name)


def tell(store: Store, step: int, **meta: Any) -> None:
    """Change what the checkpoint of a step says of itself."""
    change_manifest(store.folder(step), meta=store.meta(step) | meta)


def change_manifest(folder: Path, **changes: Any) -> None:
    """Change a manifest as a program would that writes one: it vouches for itself again."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["sha256"]
    (folder / MANIFEST).write_text(sealed(manifest | changes))


def rows(printed: str) -> list[list[str]]:
    """The cells of all tables that were printed, row by row; cells that go over several lines are joined."""
    found: list[list[str]] = []
    for line in printed.splitlines():
        if line[:1] not in "│┃" or not line:
            continue
        cells = [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")]
        goes_on = line[0] == "│" and cells[0] == "" and found and len(found[-1]) == len(cells)
        if goes_on:
            found[-1] = [f"{before} {cell}".strip() for before, cell in zip(found[-1], cells, strict=True)]
        else:
            found.append(cells)
    return found
