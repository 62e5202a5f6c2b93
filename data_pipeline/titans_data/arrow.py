"""Parquet files and Hugging Face datasets: tables with a column of text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from titans_data._imports import import_extra
from titans_data.errors import DataError
from titans_data.parts import Part, SourceFile, describe, part_size, ranges

_BATCH_ROWS = 1024
_SAVED = ("dataset_dict.json", "state.json", "dataset_info.json")


def parquet_values(part: Part, file: SourceFile, text_column: str) -> Iterator[tuple[int, int, list[bytes | None]]]:
    """First row, bytes of the file read so far, and the column's values, batch by batch.

    Raises DataError when the file cannot be read or has no such column of text.
    """
    pyarrow = import_extra("pyarrow")
    parquet = import_extra("pyarrow.parquet")
    row = 0
    try:
        with parquet.ParquetFile(file.path) as table:
            check_column(file.shown, text_column, table.schema_arrow)
            rows = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
            stop = table.num_row_groups if part.stop is None else part.stop
            row = first = sum(rows[: part.start])
            wanted = max(sum(rows[part.start : stop]), 1)
            size = part.size_bytes if len(part.files) == 1 else file.size_bytes
            for group in range(part.start, stop):
                for batch in table.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[text_column]):
                    done = size * (row + batch.num_rows - first) // wanted
                    yield row, done, _values(batch.column(0))
                    row += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{file.shown} is not a readable Parquet file (after row {row}: {one_line(error)}): repair or remove it"
        ) from error


def dataset_values(part: Part, file: SourceFile, text_column: str) -> Iterator[tuple[int, int, list[bytes | None]]]:
    """The same for one Arrow file of a Hugging Face dataset."""
    datasets = import_extra("datasets")
    row = part.start
    try:
        table = datasets.Dataset.from_file(file.path)
        check_column(file.shown, text_column, table.features.arrow_schema)
        stop = len(table) if part.stop is None else part.stop
        rows = table.select_columns([text_column]).select(range(part.start, stop)).with_format("arrow")
        for batch in rows.iter(_BATCH_ROWS):
            done = part.size_bytes * (row + batch.num_rows - part.start) // max(stop - part.start, 1)
            yield part.first_row + row, done, _values(batch.column(0))
            row += batch.num_rows
    except DataError:
        raise
    except Exception as error:  # whatever the damage, the library says it in its own ways
        raise DataError(
            f"{file.path} of {file.shown} is not a readable Arrow file (after row {part.first_row + row}: "
            f"{one_line(error)}): repair or remove it"
        ) from error


def cut_parquet(file: SourceFile, part_bytes: int) -> list[tuple[int, int]]:
    """Ranges of row groups of about `part_bytes` of the file each."""
    pyarrow = import_extra("pyarrow")
    try:
        metadata = import_extra("pyarrow.parquet").read_metadata(file.path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{file.shown} is not a readable Parquet file ({one_line(error)}): repair or remove it"
        ) from error
    sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
    share = file.size_bytes / max(sum(sizes), 1)
    pieces = []
    start, size = 0, 0.0
    for group, group_bytes in enumerate(sizes):
        if size and size + group_bytes * share > part_bytes:
            pieces.append((start, group))
            start, size = group, 0.0
        size += group_bytes * share
    return [*pieces, (start, len(sizes))]


def cut_dataset(source: str, text_column: str) -> list[Part]:
    """Ranges of rows of the Arrow files that a dataset consists of."""
    datasets = import_extra("datasets")
    loaded = _load(source)
    check_column(source, text_column, loaded.features.arrow_schema)
    files = [Path(item["filename"]) for item in loaded.cache_files]
    lengths = [len(datasets.Dataset.from_file(str(path))) for path in files]
    if sum(lengths) != len(loaded):
        raise DataError(
            f"{source} has {len(loaded)} rows, its {len(files)} Arrow files {sum(lengths)}: "
            "write it again with save_to_disk and give that folder"
        )
    described = [describe(path, path.name, source) for path in files]
    part_bytes = part_size(sum(file.size_bytes for file in described))
    parts = []
    first_row = 0
    for file, length in zip(described, lengths, strict=True):
        pieces = ranges(length, max(1, min(file.size_bytes // part_bytes, length)))
        sizes = [end - start for start, end in ranges(file.size_bytes, len(pieces))]
        for (start, stop), size in zip(pieces, sizes, strict=True):
            parts.append(Part((file,), size, start, stop, first_row))
        first_row += length
    return parts


def check_column(where: str, column: str, schema: Any) -> None:
    """Raise DataError unless the Arrow schema has the column and it holds text."""
    types = import_extra("pyarrow").types
    if column not in schema.names:
        raise no_column(where, column, schema.names)
    kind = schema.field(column).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    if not any(test(value) for test in tests):
        raise DataError(f"column {column!r} of {where} holds {kind}: set text_column to a column of strings")


def no_column(where: str, column: str, existing: Any) -> DataError:
    names = ", ".join(map(str, existing)) or "none"
    return DataError(f"{where} has no column {column!r}: set text_column to one that exists ({names})")


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _load(source: str) -> Any:
    datasets = import_extra("datasets")
    path = Path(source).expanduser()
    looks_local = source.startswith((os.sep, ".", "~"))
    if looks_local and not path.exists():
        raise DataError(f"{source} does not exist: give a folder written by save_to_disk or a hub name")
    try:
        if path.exists() and any((path / name).exists() for name in _SAVED):
            loaded: Any = datasets.load_from_disk(str(path))
        elif path.exists():
            loaded = datasets.load_dataset(str(path))
        else:
            name, _, config = source.partition(":")
            loaded = datasets.load_dataset(name, config or None, split="train")
    except Exception as error:  # datasets and its network stack raise dozens of types; each means the same here
        raise _not_loaded(source, error) from error
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise DataError(f"{source} has no split `train` but {', '.join(loaded)}: give the folder of one split")
        loaded = loaded["train"]
    return loaded


def _not_loaded(source: str, error: Exception) -> DataError:
    return DataError(
        f"{source} cannot be loaded by the datasets library ({one_line(error)}): "
        "give a folder written by save_to_disk or a hub name that this machine can reach"
    )


def _values(column: Any) -> list[bytes | None]:
    pyarrow = import_extra("pyarrow")
    # As bytes, because Arrow does not promise that a string column of a foreign file is UTF-8.
    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
    return column.cast(pyarrow.large_binary()).to_pylist()
