"""Corpus readers: folders and files of many formats become one ordered stream of documents."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from titans_data._imports import import_extra
from titans_data.card import CorpusCounts
from titans_data.errors import DataError

# What a reader yields: text, origin, and how many undecodable sequences were replaced in the text.
Raw = tuple[str, str, int]

_JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".jsonl.zst", ".ndjson.zst")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ARROW_BATCH_ROWS = 1024


@dataclass(frozen=True)
class Document:
    text: str
    origin: str
    """Where the text came from: a file, `file:line`, or `file[row]`."""


def read_corpus(format: str, source: str | None, text_column: str, counts: CorpusCounts) -> Iterator[Document]:
    """Yield the documents of a corpus in an order that depends on the corpus alone.

    `counts` is filled on the way. Documents without a character other than white space are dropped and counted.
    Raises DataError when the source, the column or every document is missing, or when a file cannot be read.
    """
    for text, origin, replaced in _READERS[format](source or "", text_column, counts):
        if not text or text.isspace():
            counts.empty += 1
            continue
        counts.documents += 1
        if replaced:
            counts.replaced_documents += 1
            counts.replaced_sequences += replaced
        yield Document(text, origin)
    if counts.documents == 0:
        found = f"{counts.empty} empty documents and {counts.garbled_lines} garbled lines"
        if counts.first_garbled:
            found += f", the first at {counts.first_garbled}"
        raise DataError(f"{source or format} has no document with text ({found}): give a source that has some")


def decode_utf8(raw: bytes) -> tuple[str, int]:
    """Decode bytes, replacing what is not UTF-8 by U+FFFD; returns the text and the number of replacements."""
    try:
        return raw.decode("utf-8"), 0
    except UnicodeDecodeError:
        text = raw.decode("utf-8", errors="replace")
        # A U+FFFD that the source itself spelled is no replacement.
        return text, text.count("\ufffd") - raw.count(b"\xef\xbf\xbd")


def _stdlib(source: str, text_column: str, counts: CorpusCounts) -> Iterator[Raw]:
    root = Path(sysconfig.get_paths()["stdlib"])
    excluded = {"site-packages", "dist-packages", "__pycache__"}
    paths = _walk(root, lambda path: path.suffix == ".py" and not excluded & set(path.relative_to(root).parts))
    for path in paths:
        text, replaced = _read_text(path)
        yield text, path.relative_to(root).as_posix(), replaced


def _text(source: str, text_column: str, counts: CorpusCounts) -> Iterator[Raw]:
    for path in _files(source, lambda path: True, "readable files"):
        text, replaced = _read_text(path)
        yield text, str(path), replaced


def _jsonl(source: str, text_column: str, counts: CorpusCounts) -> Iterator[Raw]:
    for path in _files(source, lambda path: path.name.endswith(_JSONL_SUFFIXES), "JSONL files (.jsonl, .gz, .zst)"):
        seen_text = False
        for number, line in _lines(path):
            if line.isspace():
                continue
            origin = f"{path}:{number}"
            content, replaced = decode_utf8(line.removeprefix(b"\xef\xbb\xbf"))
            record = _parse_object(content)
            if record is not None and not seen_text and text_column not in record:
                # A wrong column name is the user's mistake; one odd record later in the file is a garbled line.
                raise _no_column(origin, text_column, record)
            text = record.get(text_column, 0) if record is not None else 0
            if text is not None and not isinstance(text, str):
                counts.garbled_lines += 1
                counts.first_garbled = counts.first_garbled or origin
                continue
            seen_text = True
            # JSON can spell half of a surrogate pair, which no encoding can write.
            text, surrogates = _SURROGATE.subn("\ufffd", text or "")
            yield text, origin, replaced + surrogates


def _parquet(source: str, text_column: str, counts: CorpusCounts) -> Iterator[Raw]:
    pyarrow = import_extra("pyarrow")
    parquet = import_extra("pyarrow.parquet")
    for path in _files(source, lambda path: path.suffix == ".parquet", "Parquet files (.parquet)"):
        try:
            with parquet.ParquetFile(path) as file:
                _check_column(str(path), text_column, file.schema_arrow)
                row = 0
                for group in range(file.num_row_groups):
                    for batch in file.iter_batches(_ARROW_BATCH_ROWS, row_groups=[group], columns=[text_column]):
                        yield from _arrow_texts(batch.column(0), str(path), row)
                        row += batch.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                f"{path} is not a readable Parquet file ({_one_line(error)}): repair or remove it"
            ) from error


def _huggingface(source: str, text_column: str, counts: CorpusCounts) -> Iterator[Raw]:
    datasets = import_extra("datasets")
    looks_local = source.startswith((os.sep, ".", "~"))
    path = Path(source).expanduser()
    try:
        if path.exists():
            loaded: Any = datasets.load_from_disk(str(path))
            if isinstance(loaded, datasets.DatasetDict):
                if "train" not in loaded:
                    raise DataError(
                        f"{source} has no split `train` but {', '.join(loaded)}: give the folder of one split"
                    )
                loaded = loaded["train"]
        elif looks_local:
            raise DataError(f"{source} does not exist: give a folder written by save_to_disk or a hub name")
        else:
            name, _, config = source.partition(":")
            loaded = datasets.load_dataset(name, config or None, split="train")
    except DataError:
        raise
    except Exception as error:  # datasets and its network stack raise dozens of types; each means the same here
        raise DataError(
            f"{source} cannot be loaded by the datasets library ({_one_line(error)}): "
            "give a folder written by save_to_disk or a hub name that this machine can reach"
        ) from error
    _check_column(source, text_column, loaded.features.arrow_schema)
    row = 0
    for table in loaded.select_columns([text_column]).with_format("arrow").iter(_ARROW_BATCH_ROWS):
        yield from _arrow_texts(table.column(0), source, row)
        row += table.num_rows


_READERS: dict[str, Callable[[str, str, CorpusCounts], Iterator[Raw]]] = {
    "stdlib": _stdlib,
    "text": _text,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "huggingface": _huggingface,
}


def _walk(root: Path, wanted: Callable[[Path], bool]) -> list[Path]:
    """The wanted files below root, hidden ones left out, sorted by relative path."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    kept = [path for path in found if wanted(path) and path.is_file()]
    return sorted(kept, key=lambda path: path.relative_to(root).as_posix())


def _files(source: str, wanted: Callable[[Path], bool], kind: str) -> list[Path]:
    """A file as it is, or the wanted files of a folder; DataError when there is none."""
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{source} does not exist: give a file or a folder of {kind}")
    paths = _walk(path, wanted)
    if not paths:
        raise DataError(f"{source} holds no {kind}: give a folder that has some")
    return paths


def _read_text(path: Path) -> tuple[str, int]:
    try:
        return decode_utf8(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): repair or remove it") from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and bytes of each line of a plain, .gz or .zst file."""
    try:
        with _open_bytes(path) as file:
            yield from enumerate(file, start=1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({_one_line(error)}): repair or remove it") from error


def _open_bytes(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        return io.BufferedReader(import_extra("pyarrow").input_stream(str(path), compression="zstd"), 1 << 20)
    return path.open("rb")


def _parse_object(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _no_column(where: str, column: str, existing: Any) -> DataError:
    names = ", ".join(map(str, existing)) or "none"
    return DataError(f"{where} has no column {column!r}: set text_column to one that exists ({names})")


def _check_column(where: str, column: str, schema: Any) -> None:
    """Raise DataError unless the Arrow schema has the column and it holds text."""
    types = import_extra("pyarrow").types
    if column not in schema.names:
        raise _no_column(where, column, schema.names)
    kind = schema.field(column).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    if not any(test(value) for test in tests):
        raise DataError(f"column {column!r} of {where} holds {kind}: set text_column to a column of strings")


def _arrow_texts(column: Any, where: str, first_row: int) -> Iterator[Raw]:
    pyarrow = import_extra("pyarrow")
    # As bytes, because Arrow does not promise that a string column of a foreign file is UTF-8.
    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
    for row, value in enumerate(column.cast(pyarrow.large_binary()).to_pylist(), start=first_row):
        text, replaced = decode_utf8(value or b"")
        yield text, f"{where}[{row}]", replaced


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
