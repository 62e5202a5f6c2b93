"""Token sources: a stream of tokens of which any span can be read, in any process, at any time.

A source holds no position and shares nothing with other processes. Its `documents` ids let a model keep documents
apart: they are local to the span that was read, start at 0 and grow by one at each token that starts a document.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from titans_data._imports import import_streaming
from titans_data.card import check_sizes, load_card
from titans_data.errors import DataError
from titans_data.pages import column_types, decode_page, page_count

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

    def read(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens start to start + length: ids int64 (length,), documents int32 (length,).

        Raises DataError for a token outside the vocabulary or a damaged file, IndexError for a span outside the stream.
        """


class MdsSource:
    """One split of a folder that `prepare` wrote.

    Pages are read by streaming's LocalDataset, which opens shard files and nothing else. StreamingDataset is not used
    because opening it is a collective of the whole job and registers the reader in /dev/shm under a machine-wide
    number: jobs that start together collide there, and killed jobs leave their segments behind.

    Raises DataError when the folder, the split or a shard is missing or a file's size is not the one on the card.
    """

    def __init__(self, folder: str | Path, split: str = "train") -> None:
        self._folder = Path(folder)
        self._split = split
        card = load_card(folder)
        if split not in card.splits:
            raise DataError(f"{folder} has no split {split!r}: choose one of {', '.join(card.splits)}")
        split_card = card.splits[split]
        if not split_card.tokens:
            raise DataError(
                f"split {split!r} of {folder} is empty: prepare the corpus again with a larger validation_fraction "
                f"than {card.options.validation_fraction} or with more documents"
            )
        check_sizes(self._folder, split_card)
        self._page_tokens = card.page_tokens
        self.num_tokens = split_card.tokens
        self.vocab_size = card.vocab_size
        self.end_of_document = card.end_of_document
        self.bytes_per_token: float | None = split_card.bytes / split_card.tokens
        self.fingerprint = hashlib.sha256(f"{card.fingerprint}/{split}".encode()).hexdigest()
        self._pages = self._open_pages(column_types(np.dtype(card.dtype)))

    def __reduce__(self) -> tuple[Any, ...]:
        # Opened again in the other process, so that streaming comes in by its one door there too.
        return MdsSource, (self._folder, self._split)

    def read(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        check_span(start, length, self.num_tokens)
        tokens = np.empty(length, np.int64)
        is_start = np.zeros(length, bool)
        end = start + length
        for page in range(start // self._page_tokens, page_count(end, self._page_tokens)):
            origin = page * self._page_tokens
            page_tokens, page_starts = self._read_page(page)
            first, last = max(start - origin, 0), min(end - origin, len(page_tokens))
            tokens[origin + first - start : origin + last - start] = page_tokens[first:last]
            inside = page_starts[(page_starts >= first) & (page_starts < last)]
            is_start[inside + (origin - start)] = True
        check_tokens(tokens, self.vocab_size, f"split {self._split!r} of {self._folder}")
        return tokens, document_ids(is_start)

    def _open_pages(self, columns: dict[str, str]) -> Any:
        streaming = import_streaming()
        try:
            pages = streaming.LocalDataset(str(self._folder), self._split)
            found = [dict(zip(shard.column_names, shard.column_encodings, strict=True)) for shard in pages.shards]
        except Exception as error:  # a damaged index fails in as many ways as there are bytes
            raise DataError(
                f"{self._folder / self._split} has a damaged index ({error!r}): "
                f"restore it, or remove {self._folder} and prepare it again"
            ) from error
        # Also keeps pickled columns out, which would run code from the index of a foreign folder.
        if any(other != columns for other in found) or len(pages) != page_count(self.num_tokens, self._page_tokens):
            raise DataError(
                f"{self._folder / self._split} does not hold the pages on its card: "
                f"restore it, or remove {self._folder} and prepare it again"
            )
        return pages

    def _read_page(self, page: int) -> tuple[np.ndarray, np.ndarray]:
        expected = min(self._page_tokens, self.num_tokens - page * self._page_tokens)
        try:
            tokens, starts = decode_page(self._pages[page])
            if tokens.shape != (expected,):
                raise ValueError(f"{tokens.shape} tokens instead of {expected}")
        except Exception as error:  # damaged bytes fail in as many ways as there are bytes
            raise DataError(
                f"page {page} of split {self._split!r} of {self._folder} cannot be read ({error!r}): "
                "find the damaged shard with verify and restore it, or prepare the dataset again"
            ) from error
        return tokens, starts


class TokenFileSource:
    """A flat file of little-endian uint16 or uint32 token ids, memory-mapped (nanoGPT's .bin files).

    With `end_of_document`, the token after each such id starts a document; without it the file is one document.
    Raises DataError when the file is missing, empty, not a whole number of tokens, or the settings cannot be.
    """

    bytes_per_token: float | None = None

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
        self.vocab_size = vocab_size
        self.end_of_document = end_of_document
        try:
            self._tokens = np.memmap(self._path, np.dtype(dtype).newbyteorder("<"), mode="r")
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}): make it readable") from error
        self.fingerprint = self._fingerprint(dtype)

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
    """Open a prepared folder (its `split`) or a flat token file (which needs `dtype` and `vocab_size`).

    Raises DataError as the sources do.
    """
    if not Path(path).is_file():
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
    ids = np.cumsum(is_start, dtype=np.int32)
    return ids - ids[0]
