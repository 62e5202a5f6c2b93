"""`titans-dist data plan`: the samples of steps, and what is drawn of each dataset."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from titans_dist.config import Config, ConfigError
from titans_launch import tables
from titans_launch.data import opened

if TYPE_CHECKING:
    from titans_data import Mixture

COLUMNS = ("step", "slot", "rank", "source", "epoch", "row", "first_token")
SHOWN = 50
"""Samples that a table has at most."""


def run(config: Config) -> None:
    """Print the samples or write them to a file, then the stages and the use of each source."""
    inspect = config.inspect
    first = inspect.step or 1
    last = inspect.to_step or first
    read = opened.training_data(config)
    data = read.data
    opened.said(config, read)
    rows = planned(config, read, first, last)
    if inspect.output:
        count = write(rows, Path(inspect.output))
        print(f"{count:,} samples of steps {first:,} to {last:,} are in {tables.place(inspect.output)}")
    else:
        show(list(itertools.islice(rows, SHOWN)), (last - first + 1) * data.schedule.global_batch)
    mixture = data.schedule.mixture
    if len(mixture.names) > 1 or len(mixture.stages) > 1:
        show_stages(config, mixture)
    end = config.training.steps
    show_usage(config, read, last, f"drawn by the end of step {last:,}")
    if end != last:
        show_usage(config, read, end, f"drawn by the end of the run, step {end:,}")


def planned(config: Config, read: opened.Read, first: int, last: int) -> Iterator[tuple[int | str, ...]]:
    """The samples of steps first to last as rows of COLUMNS."""
    from titans_data.samples import samples

    length, ranks, data = config.data.sequence_length, opened.ranks(config), read.data
    for step in range(first, last + 1):
        for each in samples(data.schedule, data.sources, read.index(step), ranks):
            name = data.sources[each.source].name
            yield step, each.slot, each.rank, name, each.epoch + 1, each.row, each.row * length


def write(rows: Iterator[tuple[int | str, ...]], path: Path) -> int:
    """Write a CSV file and return its number of samples."""
    count = 0
    try:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            for row in rows:
                writer.writerow(row)
                count += 1
    except OSError as error:
        raise ConfigError(f"inspect.output={path} cannot be written ({error.strerror}); name another file") from error
    return count


def show(rows: list[tuple[int | str, ...]], total: int) -> None:
    """Print a table of samples, and how many there are beyond it."""
    table = Table(title="samples", title_justify="left")
    for name in COLUMNS:
        table.add_column(name.replace("_", " "), justify="left" if name == "source" else "right")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, str) else f"{cell:,}" for cell in row))
    tables.console().print(table)
    if total > len(rows):
        print(f"and {total - len(rows):,} more: inspect.output=FILE.csv writes all")


def show_stages(config: Config, mixture: Mixture) -> None:
    """Print from which step on which source has which share."""
    table = Table(title="stages", title_justify="left")
    for name in ("from step", "from token", *mixture.names):
        table.add_column(name, justify="right")
    for stage in mixture.stages:
        begin = stage.step * mixture.global_batch * config.data.sequence_length
        shares = (f"{share / sum(stage.shares):.2%}" for share in stage.shares)
        table.add_row(f"{stage.step + 1:,}", f"{begin:,}", *shares)
    tables.console().print(table)


def show_usage(config: Config, read: opened.Read, step: int, title: str) -> None:
    """Print what the first `step` steps draw of each source, in tokens."""
    from titans_data import usage

    length, data = config.data.sequence_length, read.data
    table = Table(title=title, title_justify="left")
    table.add_column("source")
    for name in ("tokens", "drawn", "epochs", "repeated", "unused"):
        table.add_column(name, justify="right")
    for each in usage(data.schedule, data.sources, read.index(step) + 1):
        counts = (each.rows, each.drawn, each.repeated, each.unread)
        tokens, drawn, repeated, unused = (f"{count * length:,}" for count in counts)
        table.add_row(each.name, tokens, drawn, f"{each.drawn / each.rows:.2f}", repeated, unused)
    tables.console().print(table)
