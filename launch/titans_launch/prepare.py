"""`titans-dist prepare`: from data.source to the dataset folder data.path, with progress."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType

from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from titans_data import DatasetCard, PrepareOptions
from titans_data import prepare as prepare_dataset
from titans_dist.config import Config, ConfigError, DataConfig
from titans_launch import tables

READY_MADE = ("tokens", "synthetic")
"""Formats there is nothing to prepare for."""


def run(config: Config) -> None:
    """Prepare the dataset and show what it holds."""
    data = config.data
    if data.format in READY_MADE:
        raise ConfigError(f"data={data.format} needs no preparing; train with it as it is, or choose another data=")
    started = time.monotonic()
    with Meter() as meter:
        card = prepare_dataset(options(data), data.path, meter)
    show(card, Path(data.path), time.monotonic() - started if meter.used else None)


def ensure(data: DataConfig) -> None:
    """Prepare the dataset of a training run unless it is there already; refuse one made with other options."""
    if data.format in READY_MADE:
        return
    started = time.monotonic()
    with Meter() as meter:
        card = prepare_dataset(options(data), data.path, meter)
    if meter.used:
        show(card, Path(data.path), time.monotonic() - started)


def options(data: DataConfig) -> PrepareOptions:
    """The part of the configuration a dataset depends on."""
    return PrepareOptions(
        format=data.format,
        source=data.source,
        text_column=data.text_column,
        tokenizer=data.tokenizer,
        vocab_size=data.vocab_size,
        validation_fraction=data.validation_fraction,
    )


def show(card: DatasetCard, path: Path, seconds: float | None) -> None:
    """Print the table of a dataset; `seconds` it took to make, None if it was there already."""
    tokens = sum(split.tokens for split in card.splits.values())
    counts = card.counts
    rows = [
        (name, f"{split.documents:,} documents, {split.tokens:,} tokens, {split.bytes:,} bytes")
        for name, split in card.splits.items()
    ]
    rows += [
        ("empty documents", f"{counts.empty:,} dropped"),
        ("undecodable bytes", f"replaced in {counts.replaced_documents:,} documents"),
    ]
    if counts.garbled_lines:
        rows.append(("garbled lines", f"{counts.garbled_lines:,} skipped, the first is {counts.first_garbled}"))
    rows += [
        ("tokenizer", f"{card.options.tokenizer}, {card.vocab_size:,} ids, {card.tokenizer_fingerprint[:12]}"),
        ("speed", "prepared earlier" if seconds is None else f"{tokens / seconds:,.0f} tokens/s, {seconds:.1f} s"),
        ("where", tables.place(path)),
    ]
    tables.show("dataset", rows)


class Meter:
    """Progress of prepare: a bar on a terminal, else one line per stage and one every INTERVAL_S."""

    INTERVAL_S = 10.0

    def __init__(self) -> None:
        self.used = False
        self._stage: str | None = None
        self._said = 0.0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Meter:
        if sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Called by titans_data.prepare: `total` is None while it is unknown, and `done` then counts bytes."""
        self.used = True
        new, self._stage = stage != self._stage, stage
        if self._bar is not None:
            if new or self._task is None:
                self._task = self._bar.add_task(stage, total=total)
            self._bar.update(self._task, completed=done, total=total)
        elif new or time.monotonic() - self._said > self.INTERVAL_S:
            self._said = time.monotonic()
            amount = f"{100 * done / total:.0f}%" if total else f"{done / 1e6:,.1f} MB"
            print(f"prepare | {stage} | {amount}", flush=True)
