"""From a corpus to a dataset folder, all or nothing, and never twice.

out/
    dataset.json     the card
    tokenizer/       what `load_tokenizer` reads
    train/           an MDS dataset of pages: index.json, and a folder of shards for every part of the corpus
    validation/      the same for the held-out documents

A split is one token stream: its documents in corpus order, each followed by the end-of-document id, cut into pages of
`page_tokens` tokens. A page is one MDS sample (see pages.py). The last page of a part may be shorter; the card says
how many tokens every shard holds.

The corpus is cut into parts (parts.py), which processes (pool.py) look through and tokenize (stages.py), each by
itself, in a work folder that keeps what is finished (work.py). Neither the number of processes nor a kill changes a
byte of the result.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from titans_data import pool
from titans_data.assembly import assemble
from titans_data.card import CARD_NAME, CorpusCounts, DatasetCard, PrepareOptions, load_card
from titans_data.dedup import find_duplicates
from titans_data.errors import DataError
from titans_data.parts import Part, cut
from titans_data.sample import EvenSample, first_threshold
from titans_data.stages import (
    HASHES_NAME,
    SAMPLE_NAME,
    SCAN,
    TOKENS,
    ScanTask,
    TokenizeTask,
    scan,
    tokenize,
)
from titans_data.tally import Tally, total
from titans_data.tokenize import BytesTokenizer, Tokenizer, load_tokenizer, train_bpe
from titans_data.work import Work, claimed, key_of, sync

Progress = Callable[[str, int, int | None], None]
"""Called as progress(stage, done, total): bytes of the corpus for `scan` and `tokenize`, else steps."""

# What one core tokenizes in several times the seconds that a worker takes to start. One process alone is not one core:
# the tokenizer of a small corpus has threads.
_WORTH_A_WORKER_BYTES = 64 * 1024 * 1024
_TOKENIZER = "tokenizer"
_DUPLICATES = "duplicates"
_DATASET = "dataset"


def prepare(
    options: PrepareOptions, out: str | Path, progress: Progress | None = None, workers: int = 1
) -> DatasetCard:
    """Write the dataset of `options` to the folder `out` and return its card.

    `workers` processes share the work; 0 means one per core, or fewer for a corpus too small to be worth their start.
    A script that asks for several needs the `if __name__ == "__main__"` of every program that starts processes.

    The work goes on in `<out>.tmp`, and `out` appears when all of it is done: a prepare that was killed leaves nothing
    that looks finished, and the next one goes on where it stopped. If `out` already holds a dataset prepared with
    equal options, its card is returned at once (the corpus is not looked at again). Stages reported to `progress`:
    `scan` (for bpe and deduplicate), `tokenizer` (for bpe), `duplicates` (for deduplicate), `tokenize`, `assemble`.

    Raises DataError when `out` holds anything else, when the corpus or tokenizer cannot be used, when another
    process is preparing `out`, when a worker is killed, or when writing fails.
    """
    if workers < 0:
        raise DataError(f"workers is {workers}: give 1 or more processes, or 0 for one per core")
    out = Path(out)
    report = progress or (lambda stage, done, total: None)
    work_folder = out.with_name(out.name + ".tmp")
    try:
        card = _finished(options, out)
        if card is not None:
            if work_folder.exists():
                # A kill came after the dataset took its name; whoever else has claimed the rest removes it.
                with suppress(DataError), claimed(work_folder, out):
                    shutil.rmtree(work_folder)
            return card
        out.parent.mkdir(parents=True, exist_ok=True)
        with claimed(work_folder, out) as work:
            # Another process may have finished between the look above and the claim.
            card = _finished(options, out)
            if card is None:
                card = _Preparation(options, work, report, workers).run(work_folder / _DATASET)
                (work_folder / _DATASET).rename(out)
                sync(out.parent)
            shutil.rmtree(work_folder)
            return card
    except OSError as error:
        raise DataError(f"{out} cannot be written ({error}): mend this and prepare it again") from error


def _finished(options: PrepareOptions, out: Path) -> DatasetCard | None:
    """The card when `out` is a dataset of equal options, None when there is nothing at `out`, else DataError."""
    if (out / CARD_NAME).exists():
        card = load_card(out)
        differences = [
            f"{item.name}={getattr(card.options, item.name)!r} there, {getattr(options, item.name)!r} here"
            for item in fields(PrepareOptions)
            if getattr(card.options, item.name) != getattr(options, item.name)
        ]
        if differences:
            raise DataError(
                f"{out} was prepared with other options ({'; '.join(differences)}): "
                "remove the folder or choose another one"
            )
        return card
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is not a dataset: remove it or choose another folder")
    return None


T = TypeVar("T", ScanTask, TokenizeTask)


class _Preparation:
    """One prepare: its options and its work folder, and the stages in their order."""

    def __init__(self, options: PrepareOptions, work: Work, report: Progress, workers: int) -> None:
        self._options = options
        self._work = work
        self._report = report
        self._workers = workers

    def run(self, folder: Path) -> DatasetCard:
        """Write the dataset to `folder`."""
        options = self._options
        # Before the corpus is looked at: a tokenizer that cannot be used is soon said.
        tokenizer = _ready_tokenizer(options.tokenizer)
        parts = cut(options.format, options.source, options.text_column)
        masks = [b""] * len(parts)
        if tokenizer is None or options.deduplicate:
            threshold = 0
            if tokenizer is None:
                source_bytes = sum(part.size_bytes for part in parts)
                threshold = first_threshold(options.tokenizer_sample_bytes, source_bytes)
            scans = [ScanTask(part, options, self._work.folder, threshold) for part in parts]
            reports = self._all(SCAN, scan, scans)
            self._count(parts, reports)
            if tokenizer is None:
                tokenizer = self._train(scans)
            if options.deduplicate:
                masks = self._duplicates(scans, reports)
        place = self._keep_tokenizer(tokenizer)
        tasks = [
            TokenizeTask(part, options, self._work.folder, place, tokenizer.fingerprint, mask)
            for part, mask in zip(parts, masks, strict=True)
        ]
        reports = self._all(TOKENS, tokenize, tasks)
        counts = self._count(parts, reports)
        finished = [(self._work.place(TOKENS, task.key), report) for task, report in zip(tasks, reports, strict=True)]
        self._report("assemble", 0, 1)
        card = assemble(folder, options, tokenizer, counts, finished)
        self._report("assemble", 1, 1)
        return card

    def _all(self, stage: str, function: Callable[[T, pool.Advance], None], tasks: Sequence[T]) -> list[dict[str, Any]]:
        """The reports of all tasks, in order, those that are not finished yet done first."""
        name = "tokenize" if stage == TOKENS else stage
        total_bytes = sum(task.size_bytes for task in tasks)
        reports = [self._work.report(stage, task.key) for task in tasks]
        open_tasks = [task for task, report in zip(tasks, reports, strict=True) if report is None]
        kept_bytes = total_bytes - sum(task.size_bytes for task in open_tasks)
        self._report(name, kept_bytes, total_bytes)
        worth = min(pool.usable_cores(), (total_bytes - kept_bytes) // _WORTH_A_WORKER_BYTES)
        pool.run(
            function,
            open_tasks,
            self._workers or max(1, worth),
            self._work.folder,
            lambda done: self._report(name, kept_bytes + done, total_bytes),
        )
        finished = []
        for task, report in zip(tasks, reports, strict=True):
            content = report or self._work.report(stage, task.key)
            if content is None:
                raise DataError(f"{self._work.place(stage, task.key)} vanished: let nobody else write there, and retry")
            finished.append(content)
        return finished

    def _count(self, parts: list[Part], reports: list[dict[str, Any]]) -> CorpusCounts:
        """The sum of the counts; DataError when no document is left."""
        pairs = zip(parts, reports, strict=True)
        counts = total((part.goes_on, Tally.from_json(report["tally"])) for part, report in pairs)
        if not counts.documents:
            found = [f"{counts.empty} empty documents and {counts.garbled_lines} garbled lines"]
            if counts.garbled:
                found[0] += f", the first at {counts.garbled[0]}"
            found += [f"{number} left out by {name}" for name, number in counts.filtered.items()]
            raise DataError(
                f"{self._options.source or self._options.format} has no document with text "
                f"({'; '.join(found)}): give a source that has some"
            )
        return counts

    def _train(self, scans: list[ScanTask]) -> Tokenizer:
        """A tokenizer of the samples of all parts."""
        key = key_of([task.key for task in scans], self._options.vocab_size)
        if self._work.report(_TOKENIZER, key) is not None:
            return load_tokenizer(self._work.place(_TOKENIZER, key))
        self._report("tokenizer", 0, 1)
        sample = EvenSample(self._options.tokenizer_sample_bytes)
        for task in scans:
            content = json.loads((self._work.place(SCAN, task.key) / SAMPLE_NAME).read_text(encoding="utf-8"))
            sample.merge(content["threshold"], content["pieces"])
        tokenizer = train_bpe(sample.texts(), self._options.vocab_size)
        with self._work.committing(_TOKENIZER, key) as (folder, _):
            tokenizer.save(folder)
        self._report("tokenizer", 1, 1)
        return tokenizer

    def _keep_tokenizer(self, tokenizer: Tokenizer) -> Path:
        """The folder from which workers load it."""
        key = key_of(tokenizer.fingerprint)
        if self._work.report(_TOKENIZER, key) is None:
            with self._work.committing(_TOKENIZER, key) as (folder, _):
                tokenizer.save(folder)
        return self._work.place(_TOKENIZER, key)

    def _duplicates(self, scans: list[ScanTask], reports: list[dict[str, Any]]) -> list[bytes]:
        """For each part the bits of its documents that came before in the corpus; empty when none did."""
        key = key_of([task.key for task in scans])
        if self._work.report(_DUPLICATES, key) is None:
            self._report("duplicates", 0, 1)
            masks = find_duplicates([self._work.place(SCAN, task.key) / HASHES_NAME for task in scans])
            with self._work.committing(_DUPLICATES, key) as (folder, _):
                np.save(folder / "masks.npy", np.concatenate(masks), allow_pickle=False)
            self._report("duplicates", 1, 1)
        joined = np.load(self._work.place(_DUPLICATES, key) / "masks.npy", allow_pickle=False)
        lengths = [-(-report["tally"]["documents"] // 8) for report in reports]
        pieces = np.split(joined, np.cumsum(lengths)[:-1])
        return [piece.tobytes() if piece.any() else b"" for piece in pieces]


def _ready_tokenizer(name: str) -> Tokenizer | None:
    """The tokenizer that needs no training; None for bpe."""
    if name == "bytes":
        return BytesTokenizer()
    return None if name == "bpe" else load_tokenizer(name)
