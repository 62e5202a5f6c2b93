"""`titans-dist checkpoint ls`: a table of the checkpoints of a run."""

from __future__ import annotations

import re
import time
from typing import Any

from rich.table import Table

from titans_dist.checkpoint.store import Store
from titans_dist.config import Config, ParallelConfig
from titans_dist.config.layout import describe_layout
from titans_launch import tables
from titans_launch.checkpoint import opened

COLUMNS = ("step", "saved", "size", "tokens", "loss", "processes", "state")


def run(config: Config) -> None:
    """List what is committed, oldest first, then what is not."""
    store = opened.store(config)
    table = Table(title=tables.place(store.root), title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in ("step", "size", "tokens", "loss") else "left")
    steps = store.committed()
    for step in steps:
        table.add_row(*row(store, step, is_newest=step == steps[-1]))
    for path in store.leftovers():
        size_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        table.add_row(
            f"{int(re.findall(r'[0-9]+', path.name)[0]):,}",
            saved(path.stat().st_mtime),
            opened.size(size_bytes),
            "",
            "",
            "",
            f"leftover: {path.name}",
        )
    tables.console().print(table)
    if not steps:
        print("no checkpoint is committed: a start of this run begins from step 0")


def row(store: Store, step: int, is_newest: bool) -> tuple[str, ...]:
    """The cells of one committed checkpoint."""
    manifest = store.manifest(step)
    meta, folder = manifest["meta"], store.folder(step)
    size_bytes = sum(file["size"] for file in manifest["files"].values())
    state = ["committed"]
    state += ["permanent"] if manifest["permanent"] else []
    state += ["newest"] if is_newest else []
    tokens, loss = meta.get("tokens"), meta.get("loss")
    return (
        f"{step:,}",
        saved(meta.get("time") or folder.stat().st_mtime),
        opened.size(size_bytes),
        "" if tokens is None else f"{tokens:,}",
        "" if loss is None else f"{loss:.4f}",
        processes(meta.get("job")),
        ", ".join(state),
    )


def processes(job: dict[str, Any] | None) -> str:
    """The layout and the engine that saved, in words."""
    if job is None:
        return ""
    layout = ParallelConfig(**job["layout"])
    zero = f" ZeRO-{job['zero_stage']}" if job["engine"] == "deepspeed" else ""
    return f"{job['world']} = {describe_layout(layout, layout.data or 1)}, {job['engine']}{zero}, {job['precision']}"


def saved(seconds: float) -> str:
    """Unix seconds as local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
