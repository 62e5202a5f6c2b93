"""Pages: how a token stream lies in an MDS dataset.

A page is one MDS sample with the columns
    tokens  ndarray uint16 or uint32 (page_tokens,), the last page of a shard may be shorter
    starts  bytes: little-endian int32 positions in this page where a document starts
Starts are plain bytes because MDS cannot store an ndarray of no elements, and a page inside a long document has none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from titans_data._imports import import_streaming
from titans_data.card import ShardCard, describe_file


def column_types(dtype: np.dtype) -> dict[str, str]:
    """The MDS columns of pages whose tokens are stored as `dtype`."""
    return {"tokens": f"ndarray:{dtype.name}", "starts": "bytes"}


def page_count(tokens: int, page_tokens: int) -> int:
    """How many pages a stream of `tokens` tokens takes."""
    return -(-tokens // page_tokens)


class PageWriter:
    """Writes documents as the pages of one split of one part. A split without documents leaves no folder."""

    def __init__(self, folder: Path, dtype: np.dtype, page_tokens: int, shard_bytes: int) -> None:
        self._folder = folder
        self._dtype = dtype
        self._page_tokens = page_tokens
        self._shard_bytes = shard_bytes
        self._writer: Any = None
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0
        self._starts: list[int] = []  # relative to the first pending token
        self.documents = 0
        self.tokens = 0

    def add(self, tokens: np.ndarray) -> None:
        """Append one document, its end-of-document id included."""
        self._starts.append(self._pending_tokens)
        self._pending.append(tokens.astype(self._dtype, copy=False))
        self._pending_tokens += len(tokens)
        self.documents += 1
        self.tokens += len(tokens)
        if self._pending_tokens >= self._page_tokens:
            self._flush(self._pending_tokens // self._page_tokens * self._page_tokens)

    def finish(self) -> list[ShardCard]:
        """Write the last, shorter page and the index; the cards of the shards, named as they are in the folder."""
        if self._pending_tokens:
            self._flush(self._pending_tokens)
        if self._writer is None:
            return []
        self._writer.finish()
        shards = []
        left = self.tokens
        for entry in read_index(self._folder):
            file = describe_file(self._folder, entry["raw_data"]["basename"])
            held = min(entry["samples"] * self._page_tokens, left)
            left -= held
            shards.append(ShardCard(file.name, file.size_bytes, file.sha256, held))
        return shards

    def _flush(self, length: int) -> None:
        """Write the first `length` pending tokens as pages and keep the rest."""
        if self._writer is None:
            self._writer = import_streaming().MDSWriter(
                out=str(self._folder),
                columns=column_types(self._dtype),
                hashes=["xxh64"],
                size_limit=self._shard_bytes,
            )
        stream = np.concatenate(self._pending)
        starts = np.array(self._starts, np.int64)
        for begin in range(0, length, self._page_tokens):
            end = min(begin + self._page_tokens, length)
            inside = starts[np.searchsorted(starts, begin) : np.searchsorted(starts, end)]
            self._writer.write({"tokens": stream[begin:end], "starts": (inside - begin).astype("<i4").tobytes()})
        self._pending = [stream[length:].copy()]
        self._pending_tokens = len(stream) - length
        self._starts = (starts[np.searchsorted(starts, length) :] - length).tolist()


def read_index(folder: Path) -> list[dict[str, Any]]:
    """The shards in the index of an MDS dataset."""
    return json.loads((folder / "index.json").read_text(encoding="utf-8"))["shards"]


def write_index(folder: Path, shards: list[dict[str, Any]]) -> None:
    """Make a folder with the shards, whose basenames may lie in subfolders, an MDS dataset."""
    text = json.dumps({"version": 2, "shards": shards}, sort_keys=True)
    (folder / "index.json").write_text(text, encoding="utf-8")
