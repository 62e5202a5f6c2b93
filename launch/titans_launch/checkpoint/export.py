"""`titans-dist checkpoint export`: a checkpoint as a folder that Hugging Face transformers loads."""

from __future__ import annotations

import sys
import warnings

from titans_dist.config import CheckpointError, Config, ConfigError
from titans_launch import tables
from titans_launch.checkpoint import opened


def run(config: Config) -> None:
    """Export the wanted step, or the newest that is valid."""
    if config.export.format != "hf":
        raise ConfigError(
            f"export.format={config.export.format} is none that checkpoint export writes; use hf, or titans-dist "
            "checkpoint convert"
        )
    store, step = opened.store(config), config.inspect.step
    if step is None:
        step = store.newest_valid(lambda line: print(line, file=sys.stderr))
        if step is None:
            raise CheckpointError(f"{tables.place(store.root)} has no valid checkpoint")
    else:
        store.verify(opened.step(store, step))
    with warnings.catch_warnings(action="ignore"):  # megatron-core's, of what it misses
        from titans_dist.export import export

    found = export(config, step)
    tables.show(
        f"step {step:,}, exported",
        [
            ("folder", tables.place(found.folder)),
            ("weights", f"{found.parameters:,} parameters, {found.dtype}"),
            ("files", f"{found.files}, {opened.size(found.size_bytes)}"),
            ("tokenizer", found.tokenizer),
        ],
    )
