"""Tokens made from a formula, for trials and tests without a corpus."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from titans_data.errors import DataError
from titans_data.sources import check_span, document_ids

_DOCUMENT_TOKENS = 512
_NOISE = 0.1
_LARGEST_VOCAB = 1 << 31


class SyntheticSource:
    """A learnable stream: x[k + 1] = (a x[k] + c) mod vocab_size, except that one token in ten is uniformly random.

    Documents of 512 tokens follow each other; each is a function of (seed, its number) alone, so any span is made in
    time proportional to its length, and two spans agree where they overlap. A model that has learned the rule reaches
    a loss of about 0.33 + 0.1 ln(vocab_size) nats per token, from ln(vocab_size) at the start.

    Raises DataError when a setting cannot be.
    """

    bytes_per_token: float | None = None
    tokenizer: str | None = None
    is_remote = False

    def __init__(self, vocab_size: int, num_tokens: int, seed: int = 0) -> None:
        if not 2 <= vocab_size <= _LARGEST_VOCAB:
            raise DataError(f"vocab_size of a synthetic source is {vocab_size}: give 2 to {_LARGEST_VOCAB}")
        if num_tokens < 1:
            raise DataError(f"num_tokens of a synthetic source is {num_tokens}: give at least 1")
        if seed < 0:
            raise DataError(f"seed of a synthetic source is {seed}: give 0 or more")
        self.num_tokens = num_tokens
        self.shards = np.array([0, num_tokens])
        self.vocab_size = vocab_size
        self._seed = seed
        self.fingerprint = hashlib.sha256(f"synthetic 1 {vocab_size} {num_tokens} {seed}".encode()).hexdigest()
        self._powers, self._offsets = self._rule()

    def fetch(self, start: int, length: int) -> None:
        check_span(start, length, self.num_tokens)

    def read(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        check_span(start, length, self.num_tokens)
        first, last = start // _DOCUMENT_TOKENS, (start + length - 1) // _DOCUMENT_TOKENS
        stream = np.concatenate([self._document(number) for number in range(first, last + 1)])
        offset = start - first * _DOCUMENT_TOKENS
        is_start = np.arange(start, start + length) % _DOCUMENT_TOKENS == 0
        return stream[offset : offset + length], document_ids(is_start)

    def _rule(self) -> tuple[np.ndarray, np.ndarray]:
        """P, Q uint64 (512,) with x[k + j] = (P[j] x[k] + Q[j]) mod vocab_size after j steps without noise."""
        draws = np.random.Philox(key=self._seed, counter=[0, 0, 0, 1]).random_raw(64)
        # A factor that shares no divisor with vocab_size keeps every token reachable.
        factors = [int(draw) % self.vocab_size for draw in draws[1:]]
        factor = next((f for f in factors if f > 1 and math.gcd(f, self.vocab_size) == 1), 1)
        step = int(draws[0]) % (self.vocab_size - 1) + 1
        powers, offsets = [1], [0]
        for _ in range(_DOCUMENT_TOKENS - 1):
            powers.append(powers[-1] * factor % self.vocab_size)
            offsets.append((offsets[-1] * factor + step) % self.vocab_size)
        return np.array(powers, np.uint64), np.array(offsets, np.uint64)

    def _document(self, number: int) -> np.ndarray:
        """int64 (512,) tokens of one document."""
        # Raw Philox words, unlike numpy's derived distributions, are the same in every numpy version.
        words = np.random.Philox(key=self._seed, counter=[0, number, 0, 0]).random_raw(2 * _DOCUMENT_TOKENS)
        is_random = words[:_DOCUMENT_TOKENS] < np.uint64(int(_NOISE * 2**64))
        values = words[_DOCUMENT_TOKENS:] % np.uint64(self.vocab_size)
        # Every token is so many steps of the rule after the last random one, or after the first of the document.
        positions = np.arange(_DOCUMENT_TOKENS)
        latest = np.maximum.accumulate(np.where(is_random, positions, 0))
        steps = positions - latest
        tokens = (self._powers[steps] * values[latest] + self._offsets[steps]) % np.uint64(self.vocab_size)
        return tokens.astype(np.int64)
