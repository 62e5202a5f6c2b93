"""An even sample of a text stream, taken in parts and put together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

_PIECE_CHARACTERS = 1 << 16
WHOLE = 1 << 64
"""The threshold that keeps every piece."""
_MARGIN = 64

Piece = tuple[int, str]
"""Position (a hash of the content, below WHOLE) and text."""


class EvenSample:
    """An even sample of a text stream of unknown length, at most `limit_bytes` large.

    Texts come in pieces, each kept when the hash of its content is below a threshold. Whenever the kept pieces
    outgrow the limit the threshold is halved and those above it are dropped, so the sample is spread over the whole
    stream, mostly between half of the limit and all of it, and does not depend on the order. A stream within the
    limit is kept whole, and one piece is always kept.

    Samples of parts of the stream, merged, are the sample of the stream: pieces above the final threshold are the
    only ones that any of them dropped.
    """

    def __init__(self, limit_bytes: int, threshold: int = WHOLE) -> None:
        self._limit = limit_bytes
        self.threshold = threshold
        self._kept: list[tuple[int, int, str]] = []
        self._size = 0
        self._smallest: tuple[int, int, str] | None = None

    def add(self, text: str) -> None:
        for start in range(0, len(text), _PIECE_CHARACTERS):
            piece = text[start : start + _PIECE_CHARACTERS]
            data = piece.encode("utf-8")
            self._add(int.from_bytes(hashlib.sha256(data).digest()[8:16], "big"), len(data), piece)

    def merge(self, threshold: int, pieces: Iterable[Piece]) -> None:
        """Add what another sample, of the same limit, kept of its part of the stream."""
        self.threshold = min(self.threshold, threshold)
        self._shrink()
        for position, piece in pieces:
            self._add(position, len(piece.encode("utf-8")), piece)

    def pieces(self) -> list[Piece]:
        """What is kept, in the order of the stream."""
        kept = self._kept or ([self._smallest] if self._smallest else [])
        return [(position, piece) for position, _, piece in kept]

    def texts(self) -> list[str]:
        return [piece for _, piece in self.pieces()]

    def _add(self, position: int, size: int, piece: str) -> None:
        item = (position, size, piece)
        self._smallest = min(self._smallest or item, item)
        if position >= self.threshold:
            return
        self._kept.append(item)
        self._size += size
        while self._size > self._limit and len(self._kept) > 1:
            self.threshold //= 2
            self._shrink()

    def _shrink(self) -> None:
        self._kept = [item for item in self._kept if item[0] < self.threshold]
        self._size = sum(size for _, size, _ in self._kept)


def first_threshold(limit_bytes: int, source_bytes: int) -> int:
    """Where the samples of all parts start, so that together they stay near _MARGIN times the limit.

    The margin is for text that is much less than its files: they hold other columns, or other keys.
    """
    threshold = WHOLE
    while source_bytes > _MARGIN * limit_bytes:
        source_bytes //= 2
        threshold //= 2
    return threshold
