"""Quality filters that know no language: each looks at one document and says why it is left out."""

from __future__ import annotations

import zlib

from titans_data.card import PrepareOptions

FILTERS = (
    "min_characters",
    "max_characters",
    "max_compression_ratio",
    "min_compression_ratio",
    "max_repeated_lines",
)
"""The options that filter, in the order in which they are asked; the first that rejects a document counts it."""


def rejected_by(text: str, data: bytes, options: PrepareOptions) -> str | None:
    """The name of the first filter that leaves the document out, None when it stays; `data` is its UTF-8."""
    if options.min_characters is not None and len(text) < options.min_characters:
        return "min_characters"
    if options.max_characters is not None and len(text) > options.max_characters:
        return "max_characters"
    if options.max_compression_ratio is not None or options.min_compression_ratio is not None:
        ratio = compression_ratio(data)
        if options.max_compression_ratio is not None and ratio > options.max_compression_ratio:
            return "max_compression_ratio"
        if options.min_compression_ratio is not None and ratio < options.min_compression_ratio:
            return "min_compression_ratio"
    if options.max_repeated_lines is not None and repeated_lines(text) > options.max_repeated_lines:
        return "max_repeated_lines"
    return None


def compression_ratio(data: bytes) -> float:
    """Bytes over bytes that zlib needs for them: high for repetition and boilerplate, near 1 for noise."""
    return len(data) / len(zlib.compress(data))


def repeated_lines(text: str) -> float:
    """Share of the characters that lie in lines seen before in the text; white space around lines does not count."""
    seen: set[str] = set()
    characters = repeated = 0
    for line in text.splitlines():
        line = line.strip()
        characters += len(line)
        if line in seen:
            repeated += len(line)
        seen.add(line)
    return repeated / characters if characters else 0.0
