"""`titans-dist prepare`: from data.source to the dataset folder data.path, with progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from titans_data import DatasetCard, PrepareOptions
from titans_data import prepare as prepare_dataset
from titans_dist.config import Config, ConfigError, DataConfig
from titans_launch import tables

IN_BYTES = ("scan", "tokenize")
"""Stages whose progress is in bytes of the corpus."""
READY_MADE = ("mds", "mixture", "tokens", "synthetic")
"""Formats there is nothing to prepare for."""


def run(config: Config) -> None:
    """Prepare the dataset and show what it holds."""
    data = config.data
    if data.format in READY_MADE:
        raise ConfigError(f"data={data.format} needs no preparing; train with it as it is, or choose another data=")
    card, seconds = _prepared(data)
    show(card, Path(data.path), seconds)


def ensure(data: DataConfig) -> None:
    """Prepare the dataset of a training run unless it is there already; refuse one made with other options."""
    if data.format in READY_MADE:
        return
    card, seconds = _prepared(data)
    if seconds is not None:
        show(card, Path(data.path), seconds)


def _prepared(data: DataConfig) -> tuple[DatasetCard, float | None]:
    """The card of the dataset, and the seconds it took to make; None if it was there already."""
    started = time.monotonic()
    with Meter() as meter:
        card = prepare_dataset(options(data), data.path, meter, data.prepare_workers)
    return card, time.monotonic() - started if meter.used else None


def options(data: DataConfig) -> PrepareOptions:
    """The part of the configuration a dataset depends on."""
    return PrepareOptions(
        format=data.format,
        source=data.source,
        text_column=data.text_column,
        tokenizer=data.tokenizer,
        vocab_size=data.vocab_size,
        validation_fraction=data.validation_fraction,
        deduplicate=data.deduplicate,
        min_characters=data.min_characters,
        max_characters=data.max_characters,
        max_compression_ratio=data.max_compression_ratio,
        min_compression_ratio=data.min_compression_ratio,
        max_repeated_lines=data.max_repeated_lines,
    )


def show(card: DatasetCard, path: Path, seconds: float | None) -> None:
    """Print the table of a dataset; `seconds` it took to make, None if it was there already."""
    tokens = sum(split.tokens for split in card.splits.values())
    counts = card.counts
    rows = [
        (name, f"{split.documents:,} documents, {split.tokens:,} tokens, {split.bytes:,} bytes")
        for name, split in card.splits.items()
    ]
    rows.append(("empty documents", _counted(counts.empty, "dropped", counts.first_empty)))
    replaced = f"replaced in {counts.replaced_documents:,} documents"
    rows.append(("undecodable bytes", replaced + _first(counts.first_replaced)))
    if counts.garbled_lines:
        rows.append(("garbled lines", _counted(counts.garbled_lines, "skipped", counts.garbled[0])))
    rows += [(reason, f"{number:,} dropped") for reason, number in counts.filtered.items()]
    if card.options.deduplicate:
        rows.append(("duplicates", f"{counts.duplicates:,} dropped"))
    rows += [
        ("tokenizer", f"{card.options.tokenizer}, {card.vocab_size:,} ids, {card.tokenizer_fingerprint[:12]}"),
        ("speed", "prepared earlier" if seconds is None else f"{tokens / seconds:,.0f} tokens/s, {seconds:.1f} s"),
        ("where", tables.place(path)),
    ]
    tables.show("dataset", rows)


def _counted(number: int, what: str, first: str | None) -> str:
    return f"{number:,} {what}{_first(first)}"


def _first(place: str | None) -> str:
    return f", the first is {place}" if place else ""


class Meter:
    """Progress of prepare with the time that is left: a bar on a terminal, else a line per stage and INTERVAL_S."""

    INTERVAL_S = 10.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.used = False
        self._clock = clock
        self._stage: str | None = None
        self._said = 0.0
        self._began = (0.0, 0)
        self._kept = 0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Meter:
        if sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[pace]}")
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Called by titans_data.prepare."""
        self.used = True
        now = self._clock()
        new, self._stage = stage != self._stage, stage
        if new or self._began[1] == self._kept < done:
            # Neither what an earlier prepare did counts for the pace nor the time in which workers start.
            self._began = (now, done)
        if new:
            self._kept = done
        pace = self._pace(stage, now, done, total)
        if self._bar is not None:
            if new or self._task is None:
                self._task = self._bar.add_task(stage, total=total, pace="")
            self._bar.update(self._task, completed=done, total=total, pace=" | ".join(pace))
        elif new or now - self._said > self.INTERVAL_S:
            self._said = now
            amount = f"{100 * done / total:.0f}%" if total else f"{done:,}"
            print(" | ".join(["prepare", stage, amount, *pace]), flush=True)

    def _pace(self, stage: str, now: float, done: int, total: int | None) -> list[str]:
        """Speed and time left, as soon as there is something to go by."""
        seconds, amount = now - self._began[0], done - self._began[1]
        if stage not in IN_BYTES or not total or seconds < 1 or amount <= 0:
            return []
        left = round((total - done) * seconds / amount)
        hours, minutes = left // 3600, left // 60 % 60
        clock = f"{hours}:{minutes:02}:{left % 60:02}" if hours else f"{minutes}:{left % 60:02}"
        return [f"{amount / seconds / 1e6:.1f} MB/s", f"{clock} left"]
