"""Exact duplicates: the same text again, anywhere in the corpus. The first in corpus order stays.

Every part leaves a sorted array of 128-bit hashes. Duplicates are found bucket by bucket of the hash, so that memory
holds one bucket and one bit per document, whatever the corpus.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("document", "<u4")])
"""A hash and the number of its document among those of the part that the filters kept."""
_BUCKET_ENTRIES = 1 << 22


def entries(digests: Sequence[bytes]) -> np.ndarray:
    """ENTRY (n,) of the documents of a part in order, from the first 16 bytes of their digests, sorted by hash."""
    found = np.empty(len(digests), ENTRY)
    halves = np.frombuffer(b"".join(digest[:16] for digest in digests), ">u8").reshape(-1, 2)
    found["high"], found["low"] = halves[:, 0], halves[:, 1]
    found["document"] = np.arange(len(digests))
    return found[np.lexsort((found["document"], found["low"], found["high"]))]


def find_duplicates(files: Sequence[Path], bucket_entries: int = _BUCKET_ENTRIES) -> list[np.ndarray]:
    """For each part's file of entries, in corpus order, packed bits uint8: document d is bit d, 1 for a duplicate."""
    lengths = [len(_open(file)) for file in files]
    masks = [np.zeros(-(-length // 8), np.uint8) for length in lengths]
    buckets = 1
    while sum(lengths) > buckets * bucket_entries:
        buckets *= 2
    for bucket in range(buckets):
        found, parts = _bucket(files, bucket, buckets)
        order = np.lexsort((found["document"], parts, found["low"], found["high"]))
        found, parts = found[order], parts[order]
        again = np.zeros(len(found), bool)
        again[1:] = (found["high"][1:] == found["high"][:-1]) & (found["low"][1:] == found["low"][:-1])
        documents, parts = found["document"][again], parts[again]
        order = np.argsort(parts, kind="stable")
        documents, parts = documents[order], parts[order]
        for part, start, stop in _runs(parts):
            inside = documents[start:stop]
            np.bitwise_or.at(masks[part], inside >> 3, np.uint8(1) << (inside & 7).astype(np.uint8))
    return masks


def _open(file: Path) -> np.ndarray:
    return np.load(file, mmap_mode="r", allow_pickle=False)


def _bucket(files: Sequence[Path], bucket: int, buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """The entries of a bucket, of all parts, and the number of the part of each."""
    width = (1 << 64) // buckets
    pieces = []
    for file in files:
        part = _open(file)
        start = np.searchsorted(part["high"], np.uint64(bucket * width))
        last = np.searchsorted(part["high"], np.uint64((bucket + 1) * width - 1), side="right")
        pieces.append(np.array(part[start:last]))
    numbers = np.repeat(np.arange(len(files)), [len(piece) for piece in pieces])
    return np.concatenate(pieces) if pieces else np.empty(0, ENTRY), numbers


def _runs(values: np.ndarray) -> list[tuple[int, int, int]]:
    """value, start and stop of each run of equal values."""
    if not len(values):
        return []
    edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return [(int(values[start]), start, stop) for start, stop in itertools.pairwise(edges)]
