"""What reading a part of a corpus met, and the sum over all parts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from titans_data.card import CorpusCounts

EXAMPLES = 5
"""How many garbled lines are named."""


class Place(NamedTuple):
    """Where a document came from: a file, `file:line` (from 1) or `file[row]` (from 0)."""

    file: str
    line: int | None = None
    row: int | None = None

    def __str__(self) -> str:
        if self.line is not None:
            return f"{self.file}:{self.line}"
        return self.file if self.row is None else f"{self.file}[{self.row}]"


@dataclass
class Tally:
    """The counts of one part, as CorpusCounts has them for all. Lines count from the start of the part's range."""

    documents: int = 0
    bytes_read: int = 0
    empty: int = 0
    first_empty: Place | None = None
    replaced_documents: int = 0
    replaced_sequences: int = 0
    first_replaced: Place | None = None
    garbled_lines: int = 0
    garbled: list[Place] = field(default_factory=list)
    filtered: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0
    lines: int = 0
    """Lines that start in the range, which is what line numbers of the next range of the same file start from."""

    def add_garbled(self, place: Place) -> None:
        self.garbled_lines += 1
        if len(self.garbled) < EXAMPLES:
            self.garbled.append(place)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Tally:
        places: dict[str, Any] = {
            name: Place(*content[name]) if content[name] else None for name in ("first_empty", "first_replaced")
        }
        return cls(**content | places | {"garbled": [Place(*place) for place in content["garbled"]]})


def total(parts: Iterable[tuple[bool, Tally]]) -> CorpusCounts:
    """The sum over parts in corpus order, each with whether it goes on in the file of the one before."""
    counts = CorpusCounts()
    lines_before = 0
    for goes_on, tally in parts:
        lines_before = lines_before if goes_on else 0
        counts.documents += tally.documents
        counts.bytes_read += tally.bytes_read
        counts.empty += tally.empty
        counts.replaced_documents += tally.replaced_documents
        counts.replaced_sequences += tally.replaced_sequences
        counts.garbled_lines += tally.garbled_lines
        counts.duplicates += tally.duplicates
        for reason, number in tally.filtered.items():
            counts.filtered[reason] = counts.filtered.get(reason, 0) + number
        if tally.first_empty is not None:
            counts.first_empty = counts.first_empty or _spell(tally.first_empty, lines_before)
        if tally.first_replaced is not None:
            counts.first_replaced = counts.first_replaced or _spell(tally.first_replaced, lines_before)
        room = EXAMPLES - len(counts.garbled)
        counts.garbled += [_spell(place, lines_before) for place in tally.garbled[:room]]
        lines_before += tally.lines
    counts.filtered = dict(sorted(counts.filtered.items()))
    return counts


def _spell(place: Place, lines_before: int) -> str:
    if place.line is not None:
        place = place._replace(line=place.line + lines_before)
    # A file name need not be UTF-8; the card is.
    return str(place).encode("utf-8", "backslashreplace").decode("utf-8")
