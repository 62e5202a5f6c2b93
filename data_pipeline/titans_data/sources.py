"""Token sources: a stream of tokens of which any span can be read, in any process, at any time.

A source holds no position and shares nothing with other processes. Its `documents` ids let a model keep documents
apart: they are local to the span that was read, start at 0 and grow by one at each token that starts a document.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from titans_data.cache import DEFAULT_CACHE_BYTES
from titans_data.card import FileCard, ShardCard, SplitCard
from titans_data.errors import DataError
from titans_data.files import dataset_files
from titans_data.mds import has_layout, parse_page, read_sample
from titans_data.pages import page_count
from titans_data.remote import Retries, is_url

T = TypeVar("T")

_TOKEN_DTYPES = ("uint16", "uint32")


class TokenSource(Protocol):
    """Random access to a token stream."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Changes when the tokens change; a resumed run compares it."""

    @property
    def bytes_per_token(self) -> float | None:
        """Mean UTF-8 bytes that a token stands for, None when unknown.

        Bits per byte = mean loss in nats per token / bytes_per_token / ln 2.
        """

    @property
    def shards(self) -> np.ndarray:
        """int64 (n + 1,) token offsets: where each of the n files of the stream starts, and where the last ends.

        Reading is cheap as long as it stays within few of them at a time. A source that is not made of files is one.
        """

    @property
    def tokenizer(self) -> str | None:
        """Fingerprint of the tokenizer that the tokens are of, None when unknown."""

    @property
    def is_remote(self) -> bool:
        """Whether there is anything to fetch."""

    def fetch(self, start: int, length: int) -> None:
        """Bring what `read` of this span needs to this machine, from any thread; nothing to do for local sources."""

    def read(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens start to start + length: ids int64 (length,), documents int32 (length,).

        Raises DataError for a token outside the vocabulary or a damaged file, IndexError for a span outside the stream.
        """


class MdsSource:
    """One split of a dataset that `prepare` wrote, in a local folder or below a URL such as s3://bucket/corpus.

    A URL is any that streaming downloads from, or file://. Its files are kept in the folder `cache`, by default one of
    the user's in the folder for temporary files, which all processes and runs of a node share and which may take
    `cache_bytes`. Every file is checked against the sha256 on the card before it is read.

    Streaming downloads, but StreamingDataset is not used: opening it is a collective of the whole job and registers
    the reader in /dev/shm under a machine-wide number. Jobs that start together collide there, and killed jobs leave
    their segments behind.

    A pickled source opens nothing and asks no remote when it is loaded. `read` and `fetch` may be called from several
    threads. Raises DataError when the folder, the split or a shard is missing, a file's size is not the one on the
    card, a URL cannot be read, or the cache cannot be used.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str = "train",
        cache: str | Path | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        retries: Retries | None = None,
    ) -> None:
        self._files = dataset_files(folder, cache, cache_bytes, retries)
        self._split = split
        card = self._files.card()
        if split not in card.splits:
            raise DataError(f"{folder} has no split {split!r}: choose one of {', '.join(card.splits)}")
        split_card = card.splits[split]
        if not split_card.tokens:
            raise DataError(
                f"split {split!r} of {folder} is empty: prepare the corpus again with a larger validation_fraction "
                f"than {card.options.validation_fraction} or with more documents"
            )
        self._files.check(split_card)
        self.is_remote = self._files.is_remote
        self._page_tokens = card.page_tokens
        self.num_tokens = split_card.tokens
        self.vocab_size = card.vocab_size
        self.tokenizer: str | None = card.tokenizer_fingerprint
        self.end_of_document = card.end_of_document
        self.bytes_per_token: float | None = split_card.bytes / split_card.tokens
        self.shards = np.cumsum([0, *(shard.tokens for shard in split_card.shards)], dtype=np.int64)
        self.fingerprint = hashlib.sha256(f"{card.fingerprint}/{split}".encode()).hexdigest()
        self._shard_cards = split_card.shards
        self._edges = self.shards.tolist()
        self._dtype = np.dtype(card.dtype).newbyteorder("<")
        self._check_index(split_card)

    def fetch(self, start: int, length: int) -> None:
        check_span(start, length, self.num_tokens)
        if self.is_remote:
            first, last = np.searchsorted(self.shards, (start, start + length - 1), "right") - 1
            for card in self._shard_cards[first : last + 1]:
                self._files.fetch(card)

    def read(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        check_span(start, length, self.num_tokens)
        tokens = np.empty(length, np.int64)
        documents = np.zeros(length, np.int32)
        done = 0
        shard = bisect_right(self._edges, start) - 1
        while done < length:
            within = start + done - self._edges[shard]
            page, first = divmod(within, self._page_tokens)
            page_tokens, page_starts = self._read_page(shard, page)
            last = min(first + length - done, len(page_tokens))
            tokens[done : done + last - first] = page_tokens[first:last]
            inside = page_starts[(page_starts >= first) & (page_starts < last)]
            documents[inside + (done - first)] = 1
            done += last - first
            if start + done == self._edges[shard + 1]:
                shard += 1
        documents[0] = 0
        np.add.accumulate(documents, dtype=np.int32, out=documents)
        return tokens, documents

    def _check_index(self, card: SplitCard) -> None:
        """Raise DataError unless the index has the shards on the card, laid out as this program reads them."""
        try:
            shards = self._trying_again(card.index, lambda: json.loads(self._content(card.index)))["shards"]
            found = [
                (
                    f"{self._split}/{shard['raw_data']['basename']}",
                    shard["samples"],
                    shard["raw_data"]["bytes"],
                    has_layout(shard, self._dtype),
                )
                for shard in shards
            ]
        except DataError:
            raise
        except Exception as error:  # a damaged index fails in as many ways as there are bytes
            raise DataError(
                f"{self._files.where(self._split)} has a damaged index ({error!r}): "
                "restore it, or remove the folder and prepare it again"
            ) from error
        if found != [
            (shard.name, page_count(shard.tokens, self._page_tokens), shard.size_bytes, True) for shard in card.shards
        ]:
            raise DataError(
                f"{self._files.where(self._split)} does not hold the pages on its card: "
                "restore it, or remove the folder and prepare it again"
            )

    def _read_page(self, shard: int, page: int) -> tuple[np.ndarray, np.ndarray]:
        """tokens (n,) and starts (k,) int32 of a page, both read-only."""
        card = self._shard_cards[shard]
        try:
            return self._trying_again(card, lambda: self._decode_page(card, page))
        except DataError:
            raise
        except Exception as error:  # damaged bytes fail in as many ways as there are bytes
            raise DataError(
                f"page {page} of {self._files.where(card.name)} cannot be read ({error!r}): "
                "restore the file, or prepare the dataset again"
            ) from error

    def _trying_again(self, file: FileCard, read: Callable[[], T]) -> T:
        """What `read` makes of a file, after downloading it once more if its copy here turns out to be damaged."""
        try:
            return read()
        except DataError:
            raise
        except Exception:
            if not self._files.restore(file):
                raise
            return read()

    def _content(self, file: FileCard) -> bytes:
        with os.fdopen(self._files.open(file), "rb") as content:
            return content.read()

    def _decode_page(self, card: ShardCard, page: int) -> tuple[np.ndarray, np.ndarray]:
        descriptor = self._files.open(card)
        try:
            sample = read_sample(descriptor, page, card.size_bytes)
        finally:
            os.close(descriptor)
        tokens, starts = parse_page(sample, self._dtype)
        expected = min(self._page_tokens, card.tokens - page * self._page_tokens)
        if len(tokens) != expected:
            raise ValueError(f"{len(tokens)} tokens instead of {expected}")
        largest = int(tokens.max())
        if largest >= self.vocab_size:
            raise ValueError(f"it holds token {largest}, its vocabulary ends at {self.vocab_size - 1}")
        return tokens, starts


class TokenFileSource:
    """A flat file of little-endian uint16 or uint32 token ids, memory-mapped (nanoGPT's .bin files).

    With `end_of_document`, the token after each such id starts a document; without it the file is one document.
    Raises DataError when the file is missing, empty, not a whole number of tokens, or the settings cannot be.
    """

    bytes_per_token: float | None = None
    tokenizer: str | None = None
    is_remote = False

    def __init__(
        self, path: str | Path, dtype: str = "uint16", vocab_size: int = 1 << 16, end_of_document: int | None = None
    ) -> None:
        self._path = Path(path)
        if dtype not in _TOKEN_DTYPES:
            raise DataError(f"dtype of {path} is {dtype!r}: choose one of {', '.join(_TOKEN_DTYPES)}")
        if vocab_size < 1:
            raise DataError(f"vocab_size of {path} is {vocab_size}: give at least 1")
        if end_of_document is not None and not 0 <= end_of_document < vocab_size:
            raise DataError(f"end_of_document of {path} is {end_of_document}: give an id from 0 to {vocab_size - 1}")
        if not self._path.is_file():
            raise DataError(f"{path} is not a file: give a flat file of {dtype} tokens")
        item_bytes = np.dtype(dtype).itemsize
        size = self._path.stat().st_size
        if size == 0 or size % item_bytes:
            raise DataError(
                f"{path} has {size} bytes, which is no whole number of {dtype} tokens of {item_bytes} bytes: "
                "give the dtype it was written with or write it again"
            )
        self.num_tokens = size // item_bytes
        self.shards = np.array([0, self.num_tokens])
        self.vocab_size = vocab_size
        self.end_of_document = end_of_document
        try:
            self._tokens = np.memmap(self._path, np.dtype(dtype).newbyteorder("<"), mode="r")
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}): make it readable") from error
        self.fingerprint = self._fingerprint(dtype)

    def fetch(self, start: int, length: int) -> None:
        check_span(start, length, self.num_tokens)

    def read(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        check_span(start, length, self.num_tokens)
        tokens = np.asarray(self._tokens[start : start + length]).astype(np.int64)
        check_tokens(tokens, self.vocab_size, str(self._path))
        is_start = np.zeros(length, bool)
        if self.end_of_document is not None:
            is_start[1:] = tokens[:-1] == self.end_of_document
        return tokens, document_ids(is_start)

    def _fingerprint(self, dtype: str) -> str:
        """sha256 over the settings and 64 evenly spaced windows: a file of a terabyte must open at once."""
        digest = hashlib.sha256(f"{dtype} {self.vocab_size} {self.end_of_document} {self.num_tokens}".encode())
        window = 4096
        for start in sorted({int(x) for x in np.linspace(0, max(self.num_tokens - window, 0), 64)}):
            digest.update(self._tokens[start : start + window].tobytes())
        return digest.hexdigest()


def open_source(
    path: str | Path,
    split: str = "train",
    dtype: str | None = None,
    vocab_size: int | None = None,
    end_of_document: int | None = None,
) -> TokenSource:
    """Open a prepared folder or URL (its `split`) or a flat token file (which needs `dtype` and `vocab_size`).

    Raises DataError as the sources do.
    """
    if is_url(path) or not Path(path).is_file():
        return MdsSource(path, split)
    if dtype is None or vocab_size is None:
        raise DataError(f"{path} is a flat token file, which does not say its dtype and vocab_size: give both")
    return TokenFileSource(path, dtype, vocab_size, end_of_document)


def check_span(start: int, length: int, num_tokens: int) -> None:
    if start < 0 or length < 1 or start + length > num_tokens:
        raise IndexError(f"span of {length} tokens from {start} is not inside a stream of {num_tokens} tokens")


def check_tokens(tokens: np.ndarray, vocab_size: int, where: str) -> None:
    largest = int(tokens.max())
    if largest >= vocab_size:
        raise DataError(
            f"{where} holds token {largest}, its vocabulary ends at {vocab_size - 1}: "
            "give the vocabulary it was written with, or check it for damage"
        )


def document_ids(is_start: np.ndarray) -> np.ndarray:
    """Bool (n,) "this token starts a document" to int32 (n,) ids; the first token has id 0 whether it starts one."""
    begins = np.flatnonzero(is_start[1:]) + 1
    lengths = np.diff(begins, prepend=0, append=len(is_start))
    return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
