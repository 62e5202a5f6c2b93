"""Corpus readers: the files of a part, of any format, become one ordered stream of documents."""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from titans_data import arrow
from titans_data._imports import import_extra
from titans_data.errors import DataError
from titans_data.parts import Part, SourceFile, check_unchanged, cut
from titans_data.tally import Place, Tally

# What a reader yields: text, place, how many undecodable sequences were replaced in the text, and how many bytes of
# the file have been read.
Raw = tuple[str, Place, int, int]

_SURROGATE = re.compile("[\ud800-\udfff]")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Document:
    text: str
    data: bytes
    """The text in UTF-8."""
    origin: Place
    """Where it came from; lines count from the start of the part's range."""
    position: int
    """Bytes of the part's files that have been read, this document included."""


def read_corpus(format: str, source: str | None, text_column: str, tally: Tally) -> Iterator[Document]:
    """Yield the documents of a whole corpus, part by part."""
    for part in cut(format, source, text_column):
        yield from read_part(format, part, text_column, tally)


def read_part(format: str, part: Part, text_column: str, tally: Tally) -> Iterator[Document]:
    """Yield the documents of a part in the order of its files.

    `tally` is filled on the way. Documents without a character other than white space are dropped and counted.
    Raises DataError when a file cannot be read, lacks the column, or changes meanwhile.
    """
    before = 0
    for file in part.files:
        for text, place, replaced, position in _READERS[format](part, file, text_column, tally):
            data = text.encode("utf-8")
            tally.bytes_read += len(data)
            if not text or text.isspace():
                tally.empty += 1
                tally.first_empty = tally.first_empty or place
                continue
            if replaced:
                tally.replaced_documents += 1
                tally.replaced_sequences += replaced
                tally.first_replaced = tally.first_replaced or place
            yield Document(text, data, place, before + position)
        before += file.size_bytes
    check_unchanged(part)


def decode_utf8(raw: bytes) -> tuple[str, int]:
    """Decode bytes, replacing what is not UTF-8 by U+FFFD; returns the text and the number of replacements."""
    try:
        return raw.decode("utf-8"), 0
    except UnicodeDecodeError:
        text = raw.decode("utf-8", errors="replace")
        # A U+FFFD that the source itself spelled is no replacement.
        return text, text.count("\ufffd") - raw.count(b"\xef\xbf\xbd")


def _text(part: Part, file: SourceFile, text_column: str, tally: Tally) -> Iterator[Raw]:
    try:
        text, replaced = decode_utf8(Path(file.path).read_bytes())
    except OSError as error:
        raise DataError(f"{file.shown} cannot be read ({error.strerror}): repair or remove it") from error
    yield text, Place(file.shown), replaced, file.size_bytes


def _jsonl(part: Part, file: SourceFile, text_column: str, tally: Tally) -> Iterator[Raw]:
    seen_text = part.start > 0
    for number, position, line in lines(Path(file.path), file.shown, part.start, part.stop):
        tally.lines += 1
        if line.isspace():
            continue
        place = Place(file.shown, line=number)
        content, replaced = decode_utf8(line.removeprefix(_BOM))
        record = _parse_object(content)
        if record is not None and not seen_text and text_column not in record:
            # A wrong column name is the user's mistake; one odd record later in the file is a garbled line.
            raise arrow.no_column(str(place), text_column, record)
        text = record.get(text_column, 0) if record is not None else 0
        if text is not None and not isinstance(text, str):
            tally.add_garbled(place)
            continue
        seen_text = True
        # JSON can spell half of a surrogate pair, which no encoding can write.
        text, surrogates = _SURROGATE.subn("\ufffd", text or "")
        del record, content, line  # a document may be large, and there is no need for it three times
        yield text, place, replaced + surrogates, position


def _arrow(read: Callable[..., Iterator[tuple[int, int, list[bytes | None]]]]) -> Callable[..., Iterator[Raw]]:
    def reader(part: Part, file: SourceFile, text_column: str, tally: Tally) -> Iterator[Raw]:
        for first, position, values in read(part, file, text_column):
            for row, value in enumerate(values, start=first):
                text, replaced = decode_utf8(value or b"")
                yield text, Place(file.shown, row=row), replaced, position

    return reader


_READERS: dict[str, Callable[[Part, SourceFile, str, Tally], Iterator[Raw]]] = {
    "stdlib": _text,
    "text": _text,
    "jsonl": _jsonl,
    "parquet": _arrow(arrow.parquet_values),
    "huggingface": _arrow(arrow.dataset_values),
}


def lines(path: Path, shown: str, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int, bytes]]:
    """Number (from 1), bytes read and bytes of each line of a plain, .gz or .zst file that starts in the range.

    Only plain files may have a range. Bytes read are of the file as it is stored, from the start of the range.
    """
    number = 0
    try:
        with _open_bytes(path) as (file, tell):
            if start:
                file.seek(start - 1)
                # In pieces, because the line that is left to the range before may be as long as the file.
                while (skipped := file.readline(1 << 20)) and not skipped.endswith(b"\n"):
                    pass
            position = file.tell() if stop is not None else 0
            while (stop is None or position < stop) and (line := file.readline()):
                position += len(line)
                number += 1
                yield number, tell() - start, line
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{shown} cannot be read after line {number} ({arrow.one_line(error)}): repair or remove it"
        ) from error


@contextmanager
def _open_bytes(path: Path) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """The content of a file, and a function that tells how many of its stored bytes have been read."""
    if path.suffix == ".gz":
        with path.open("rb") as stored, gzip.open(stored) as content:
            yield io.BufferedReader(content, 1 << 20), stored.tell
    elif path.suffix == ".zst":
        pyarrow = import_extra("pyarrow")
        with pyarrow.OSFile(str(path)) as stored, pyarrow.CompressedInputStream(stored, "zstd") as content:
            yield io.BufferedReader(content, 1 << 20), stored.tell
    else:
        with path.open("rb", 1 << 20) as content:
            yield content, content.tell


def _parse_object(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
