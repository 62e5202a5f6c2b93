"""A part of a token source, as a source of its own."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from titans_data.errors import DataError

if TYPE_CHECKING:
    from titans_data.sources import TokenSource


class SpanSource:
    """The `num_tokens` tokens of `whole` from `start` on: how a source without splits is cut into them.

    Raises DataError when the span is empty or reaches past the end.
    """

    def __init__(self, whole: TokenSource, start: int, num_tokens: int) -> None:
        if start < 0 or num_tokens < 1 or start + num_tokens > whole.num_tokens:
            raise DataError(
                f"a part of {num_tokens} tokens from token {start} is not inside the {whole.num_tokens} tokens there "
                "are: give more tokens or another validation_fraction"
            )
        self.num_tokens = num_tokens
        self.vocab_size = whole.vocab_size
        self.bytes_per_token = whole.bytes_per_token
        self.tokenizer = whole.tokenizer
        self.is_remote = whole.is_remote
        self.fingerprint = hashlib.sha256(f"{whole.fingerprint} {start} {num_tokens}".encode()).hexdigest()
        self._whole, self._start = whole, start
        self.shards = np.unique(np.clip(whole.shards, start, start + num_tokens)) - start

    def fetch(self, start: int, length: int) -> None:
        self._check(start, length)
        self._whole.fetch(self._start + start, length)

    def read(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """As in TokenSource, counted from the start of the span."""
        self._check(start, length)
        return self._whole.read(self._start + start, length)

    def _check(self, start: int, length: int) -> None:
        if start < 0 or length < 1 or start + length > self.num_tokens:
            raise IndexError(f"span of {length} tokens from {start} is not inside a stream of {self.num_tokens} tokens")
