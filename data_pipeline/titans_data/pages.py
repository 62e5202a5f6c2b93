"""Pages: how a token stream lies in an MDS dataset.

A page is one MDS sample with the columns
    tokens  ndarray uint16 or uint32 (page_tokens,), the last page of a split shorter
    starts  bytes: little-endian int32 positions in this page where a document starts
Starts are plain bytes because MDS cannot store an ndarray of no elements, and a page inside a long document has none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from titans_data._imports import import_streaming


def column_types(dtype: np.dtype) -> dict[str, str]:
    """The MDS columns of pages whose tokens are stored as `dtype`."""
    return {"tokens": f"ndarray:{dtype.name}", "starts": "bytes"}


def page_count(tokens: int, page_tokens: int) -> int:
    """How many pages a stream of `tokens` tokens takes."""
    return -(-tokens // page_tokens)


def decode_page(sample: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """tokens (n,) and starts (k,) int32 of one MDS sample, both read-only."""
    return sample["tokens"], np.frombuffer(sample["starts"], "<i4")


class PageWriter:
    """Writes documents as the pages of one split."""

    def __init__(self, folder: Path, dtype: np.dtype, page_tokens: int, shard_bytes: int) -> None:
        self._writer = import_streaming().MDSWriter(
            out=str(folder), columns=column_types(dtype), hashes=["xxh64"], size_limit=shard_bytes
        )
        self._dtype = dtype
        self._page_tokens = page_tokens
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0
        self._starts: list[int] = []  # relative to the first pending token
        self.documents = 0
        self.tokens = 0

    def add(self, tokens: np.ndarray) -> None:
        """Append one document, its end-of-document id included."""
        self._starts.append(self._pending_tokens)
        self._pending.append(tokens.astype(self._dtype))
        self._pending_tokens += len(tokens)
        self.documents += 1
        self.tokens += len(tokens)
        if self._pending_tokens >= self._page_tokens:
            self._flush(self._pending_tokens // self._page_tokens * self._page_tokens)

    def finish(self) -> None:
        """Write the last, shorter page and the index."""
        if self._pending_tokens:
            self._flush(self._pending_tokens)
        self._writer.finish()

    def _flush(self, length: int) -> None:
        """Write the first `length` pending tokens as pages and keep the rest."""
        stream = np.concatenate(self._pending)
        starts = np.array(self._starts, np.int64)
        for begin in range(0, length, self._page_tokens):
            end = min(begin + self._page_tokens, length)
            inside = starts[np.searchsorted(starts, begin) : np.searchsorted(starts, end)]
            self._writer.write({"tokens": stream[begin:end], "starts": (inside - begin).astype("<i4").tobytes()})
        self._pending = [stream[length:].copy()]
        self._pending_tokens = len(stream) - length
        self._starts = (starts[np.searchsorted(starts, length) :] - length).tolist()
