"""What is done to one part of a corpus: looking it through, and turning it into pages of tokens."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from titans_data.card import SPLITS, PrepareOptions
from titans_data.corpus import Document, read_part
from titans_data.dedup import entries
from titans_data.filters import rejected_by
from titans_data.pages import PageWriter
from titans_data.parts import Part
from titans_data.pool import Advance
from titans_data.sample import EvenSample
from titans_data.tally import Tally
from titans_data.tokenize import Tokenizer, load_tokenizer
from titans_data.work import Work, key_of

SCAN = "scan"
TOKENS = "tokens"
SAMPLE_NAME = "sample.json"
HASHES_NAME = "hashes.npy"
# Enough for a tokenizer to work on between two reports, little enough to hold.
_BATCH_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class ScanTask:
    """Take a sample of a part for a tokenizer to train on, and the hashes of its documents."""

    part: Part
    options: PrepareOptions
    folder: Path
    threshold: int
    """Where the sample starts, see EvenSample; 0 takes none."""

    @property
    def size_bytes(self) -> int:
        return self.part.size_bytes

    @functools.cached_property
    def key(self) -> str:
        return key_of(
            SCAN,
            asdict(self.part),
            _reading_options(self.options),
            self.options.tokenizer_sample_bytes if self.threshold else 0,
            self.threshold,
        )


@dataclass(frozen=True)
class TokenizeTask:
    """Write the pages of a part."""

    part: Part
    options: PrepareOptions
    folder: Path
    tokenizer: Path
    fingerprint: str
    """Of the tokenizer."""
    duplicates: bytes
    """Bit d, lowest first, says whether document d, of those that the filters keep, is left out; empty when none is."""

    @property
    def size_bytes(self) -> int:
        return self.part.size_bytes

    @functools.cached_property
    def key(self) -> str:
        options = self.options
        return key_of(
            TOKENS,
            asdict(self.part),
            _reading_options(options),
            options.validation_fraction,
            options.page_tokens,
            options.shard_bytes,
            self.fingerprint,
            hashlib.sha256(self.duplicates).hexdigest(),
        )


def scan(task: ScanTask, advance: Advance) -> None:
    """Commit the sample and the hashes of a part."""
    tally = Tally()
    sample = EvenSample(task.options.tokenizer_sample_bytes, task.threshold)
    digests = []
    reported = 0
    with Work(task.folder).committing(SCAN, task.key) as (folder, report):
        for document, digest in _kept(task.part, task.options, tally):
            tally.documents += 1
            if task.threshold:
                sample.add(document.text)
            if task.options.deduplicate:
                digests.append(digest)
            if document.position - reported >= _BATCH_BYTES:
                reported = document.position
                advance(reported)
        if task.threshold:
            content = {"threshold": sample.threshold, "pieces": sample.pieces()}
            (folder / SAMPLE_NAME).write_text(json.dumps(content), encoding="utf-8")
        if task.options.deduplicate:
            np.save(folder / HASHES_NAME, entries(digests), allow_pickle=False)
        report["tally"] = tally.to_json()


def tokenize(task: TokenizeTask, advance: Advance) -> None:
    """Commit the pages of a part."""
    options = task.options
    tokenizer = _tokenizer(task.tokenizer, task.fingerprint)
    dtype = np.dtype(storage_dtype(tokenizer))
    end = np.array(tokenizer.end_of_document, dtype)
    tally = Tally()
    bytes_of = dict.fromkeys(SPLITS, 0)
    with Work(task.folder).committing(TOKENS, task.key) as (folder, report):
        writers = {
            split: PageWriter(folder / split, dtype, options.page_tokens, options.shard_bytes) for split in SPLITS
        }
        kept = _unique(_kept(task.part, options, tally), task.duplicates, tally)
        for batch in _batches(kept):
            encoded = tokenizer.encode_batch([document.text for document, _ in batch])
            for (document, digest), tokens in zip(batch, encoded, strict=True):
                split = _split_of(digest, options.validation_fraction)
                writers[split].add(np.append(tokens.astype(dtype), end))
                bytes_of[split] += len(document.data)
                tally.documents += 1
            advance(batch[-1][0].position)
            del encoded, batch, document, tokens  # before the next batch is read: it may be large
        report["splits"] = {
            split: {
                "shards": [asdict(shard) for shard in writer.finish()],
                "documents": writer.documents,
                "tokens": writer.tokens,
                "bytes": bytes_of[split],
            }
            for split, writer in writers.items()
        }
        report["tally"] = tally.to_json()


def storage_dtype(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def _reading_options(options: PrepareOptions) -> dict[str, Any]:
    """What decides which documents a part has."""
    plain = PrepareOptions(format=options.format, source=options.source)
    others = {
        name: getattr(plain, name)
        for name in (
            "tokenizer",
            "vocab_size",
            "tokenizer_sample_bytes",
            "validation_fraction",
            "page_tokens",
            "shard_bytes",
        )
    }
    return asdict(replace(options, **others))


def _kept(part: Part, options: PrepareOptions, tally: Tally) -> Iterator[tuple[Document, bytes]]:
    """The documents that the filters keep, each with the sha256 of its UTF-8."""
    for document in read_part(options.format, part, options.text_column, tally):
        reason = rejected_by(document.text, document.data, options)
        if reason is None:
            yield document, hashlib.sha256(document.data).digest()
        else:
            tally.filtered[reason] = tally.filtered.get(reason, 0) + 1


def _unique(
    documents: Iterator[tuple[Document, bytes]], duplicates: bytes, tally: Tally
) -> Iterator[tuple[Document, bytes]]:
    for number, item in enumerate(documents):
        if duplicates and duplicates[number >> 3] >> (number & 7) & 1:
            tally.duplicates += 1
        else:
            yield item


def _batches(documents: Iterator[tuple[Document, bytes]]) -> Iterator[list[tuple[Document, bytes]]]:
    """Groups of documents of about _BATCH_BYTES of text."""
    batch = []
    size = 0
    for item in documents:
        batch.append(item)
        size += len(item[0].data)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _split_of(digest: bytes, validation_fraction: float) -> str:
    """Chosen by content, so that neither order nor other documents matter, and equal documents stay together."""
    position = int.from_bytes(digest[:8], "big") / 2**64
    return "validation" if position < validation_fraction else "train"


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: Path, fingerprint: str) -> Tokenizer:
    """Loaded once per process; the fingerprint tells one folder's successive tokenizers apart."""
    return load_tokenizer(folder)
