"""From a corpus to a dataset folder, all or nothing.

out/
    dataset.json     the card, written last
    tokenizer/       what `load_tokenizer` reads
    train/           an MDS dataset of pages
    validation/      the same for the held-out documents

A split is one token stream: its documents in corpus order, each followed by the end-of-document id, cut into pages of
`page_tokens` tokens, the last one shorter. A page is one MDS sample (see pages.py), so that any span of the stream is
found by arithmetic.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import numpy as np

from titans_data.card import (
    CARD_NAME,
    SPLITS,
    TOKENIZER_FOLDER,
    CorpusCounts,
    DatasetCard,
    PrepareOptions,
    SplitCard,
    dataset_fingerprint,
    describe_file,
    load_card,
)
from titans_data.corpus import Document, read_corpus
from titans_data.errors import DataError
from titans_data.pages import PageWriter
from titans_data.tokenize import BytesTokenizer, Tokenizer, load_tokenizer, train_bpe

Progress = Callable[[str, int, int | None], None]
"""Called as progress(stage, done, total): bytes of text (`digest`: splits) done, and in all or None when unknown."""

# Enough text for both cores to encode between two reports, little enough to hold.
_BATCH_BYTES = 4 * 1024 * 1024
_SAMPLE_PIECE_CHARACTERS = 1 << 16


def prepare(options: PrepareOptions, out: str | Path, progress: Progress | None = None) -> DatasetCard:
    """Write the dataset of `options` to the folder `out` and return its card.

    The work goes on in `<out>.tmp`, which takes the name `out` when all of it is done: a prepare that was killed
    leaves nothing that looks finished, and the next one starts again. If `out` already holds a dataset prepared with
    equal options, its card is returned at once (the corpus is not looked at again). Stages reported to `progress`:
    `tokenizer` (only for bpe), `tokenize`, `digest`.

    Raises DataError when `out` holds anything else, when the corpus or tokenizer cannot be used, when another
    process is preparing `out`, or when writing fails.
    """
    out = Path(out)
    report = progress or (lambda stage, done, total: None)
    card = _finished(options, out)
    if card is not None:
        return card
    temporary = out.with_name(out.name + ".tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _claimed(temporary, out):
            # Another process may have finished between the look above and the claim.
            card = _finished(options, out)
            if card is None:
                card = _write(options, temporary, report)
                temporary.rename(out)
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


@contextmanager
def _claimed(temporary: Path, out: Path) -> Iterator[None]:
    """Make `temporary` an empty folder that belongs to this process; the claim dies with the process."""
    temporary.mkdir(exist_ok=True)
    handle = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous owner may have renamed the folder after it was opened here.
            ours = temporary.exists() and os.path.samestat(os.fstat(handle), temporary.stat())
        except BlockingIOError:
            ours = False
        if not ours:
            raise DataError(f"another process is preparing {out}: wait until it is done, then run this again")
        for entry in temporary.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        yield
    finally:
        os.close(handle)


def _write(options: PrepareOptions, folder: Path, report: Progress) -> DatasetCard:
    tokenizer, total = _make_tokenizer(options, report)
    tokenizer.save(folder / TOKENIZER_FOLDER)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    writers = {
        split: PageWriter(folder / split, np.dtype(dtype), options.page_tokens, options.shard_bytes) for split in SPLITS
    }
    counts = CorpusCounts()
    sizes = dict.fromkeys(SPLITS, 0)
    done = 0
    end = np.array([tokenizer.end_of_document], np.uint32)
    for documents, encoded in _batches(read_corpus(options.format, options.source, options.text_column, counts)):
        for data, tokens in zip(encoded, tokenizer.encode_batch([item.text for item in documents]), strict=True):
            split = _split_of(data, options.validation_fraction)
            writers[split].add(np.concatenate([tokens, end]))
            sizes[split] += len(data)
            done += len(data)
        report("tokenize", done, total)
    splits = {}
    for split, writer in writers.items():
        writer.finish()
        names = sorted(path.name for path in (folder / split).glob("*.mds"))
        splits[split] = SplitCard(
            documents=writer.documents,
            tokens=writer.tokens,
            bytes=sizes[split],
            index=describe_file(folder, f"{split}/index.json"),
            shards=tuple(describe_file(folder, f"{split}/{name}") for name in names),
        )
        report("digest", len(splits), len(SPLITS))
    if not splits["train"].documents:
        raise DataError(
            f"all {counts.documents} documents of {options.source or options.format} fell into the validation split: "
            f"lower validation_fraction from {options.validation_fraction} or give more documents"
        )
    card = DatasetCard(
        options=options,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
        dtype=dtype,
        page_tokens=options.page_tokens,
        counts=counts,
        splits=splits,
        fingerprint=dataset_fingerprint(tokenizer.fingerprint, splits),
    )
    card.write(folder)
    return card


def _make_tokenizer(options: PrepareOptions, report: Progress) -> tuple[Tokenizer, int | None]:
    """The tokenizer, and the bytes of the corpus when it had to be read for that."""
    if options.tokenizer == "bytes":
        return BytesTokenizer(), None
    if options.tokenizer != "bpe":
        return load_tokenizer(options.tokenizer), None
    sample = EvenSample(options.tokenizer_sample_bytes)
    done = 0
    for documents, encoded in _batches(
        read_corpus(options.format, options.source, options.text_column, CorpusCounts())
    ):
        for document in documents:
            sample.add(document.text)
        done += sum(map(len, encoded))
        report("tokenizer", done, None)
    tokenizer = train_bpe(sample.texts(), options.vocab_size)
    report("tokenizer", done, done)
    return tokenizer, done


def _batches(corpus: Iterator[Document]) -> Iterator[tuple[list[Document], list[bytes]]]:
    """Group documents, with their UTF-8 bytes, into batches of about _BATCH_BYTES."""
    documents: list[Document] = []
    encoded: list[bytes] = []
    size = 0
    for document in corpus:
        documents.append(document)
        encoded.append(document.text.encode("utf-8"))
        size += len(encoded[-1])
        if size >= _BATCH_BYTES:
            yield documents, encoded
            documents, encoded, size = [], [], 0
    if documents:
        yield documents, encoded


def _split_of(data: bytes, validation_fraction: float) -> str:
    """Chosen by content, so that neither order nor other documents matter, and equal documents stay together."""
    position = int.from_bytes(hashlib.sha256(data).digest()[:8], "big") / 2**64
    return "validation" if position < validation_fraction else "train"


class EvenSample:
    """An even sample of a text stream of unknown length, at most `limit_bytes` large.

    Texts come in pieces, each kept when the hash of its content is below a threshold. Whenever the kept pieces
    outgrow the limit the threshold is halved and those above it are dropped, so the sample is spread over the whole
    stream, mostly between half of the limit and all of it, and does not depend on the order. A stream within the
    limit is kept whole, and one piece is always kept.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._threshold = 1 << 64
        self._kept: list[tuple[int, int, str]] = []
        self._size = 0

    def add(self, text: str) -> None:
        for start in range(0, len(text), _SAMPLE_PIECE_CHARACTERS):
            piece = text[start : start + _SAMPLE_PIECE_CHARACTERS]
            data = piece.encode("utf-8")
            position = int.from_bytes(hashlib.sha256(data).digest()[8:16], "big")
            if position < self._threshold:
                self._kept.append((position, len(data), piece))
                self._size += len(data)
            while self._size > self._limit and len(self._kept) > 1:
                self._threshold //= 2
                self._kept = [item for item in self._kept if item[0] < self._threshold] or [min(self._kept)]
                self._size = sum(size for _, size, _ in self._kept)

    def texts(self) -> list[str]:
        return [piece for _, _, piece in self._kept]
