"""A corpus as an ordered list of parts, each read and written by itself.

The list depends on the corpus alone. Small files are grouped, and where a group ends depends on the names and sizes
around it, so that a file that comes, goes or changes moves its own part and perhaps the next, and no other. A large
JSONL file is cut into byte ranges, a Parquet file into ranges of row groups, a Hugging Face dataset into ranges of
rows. Text files and compressed files are never cut.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from titans_data.errors import DataError

SMALLEST_PART = 1 << 20
LARGEST_PART = 1 << 28
_PARTS_WANTED = 64
_MOST_FILES = 1 << 14
# So that the seams of a folder of tiny files are not too far apart.
_SMALLEST_WEIGHT = 256

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".jsonl.zst", ".ndjson.zst")
_COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True)
class SourceFile:
    path: str
    name: str
    """Path below the source, with forward slashes."""
    shown: str
    """How messages name it."""
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Part:
    files: tuple[SourceFile, ...]
    size_bytes: int
    """Bytes of the files that the part stands for."""
    start: int = 0
    stop: int | None = None
    """A range of one file that is cut: bytes of JSONL (the lines that start there), row groups of Parquet, or rows."""
    first_row: int = 0
    """The number of the file's first row in the dataset."""

    @property
    def goes_on(self) -> bool:
        """Whether it goes on in the file of the part before."""
        return self.start > 0


def cut(format: str, source: str | None, text_column: str) -> list[Part]:
    """The parts of a corpus. Raises DataError when the source is missing or holds no such files."""
    if format == "huggingface":
        from titans_data import arrow

        return arrow.cut_dataset(source or "", text_column)
    files = list_files(format, source or "")
    part_bytes = part_size(sum(file.size_bytes for file in files))
    return list(cut_files(format, files, part_bytes))


def part_size(total_bytes: int) -> int:
    """Bytes of one part: a power of two, so that it seldom changes when the corpus does."""
    wanted = max(total_bytes // _PARTS_WANTED, 1)
    return min(max(1 << (wanted.bit_length() - 1), SMALLEST_PART), LARGEST_PART)


def cut_files(format: str, files: list[SourceFile], part_bytes: int) -> Iterator[Part]:
    """Ranges of the files that can be cut, groups of the others, in the order of the files."""
    group: list[SourceFile] = []
    size = 0
    for file in files:
        large = file.size_bytes >= part_bytes
        if large and group:
            yield _whole(group)
            group, size = [], 0
        if large:
            yield from _cut_file(format, file, part_bytes)
            continue
        group.append(file)
        weight = max(file.size_bytes, _SMALLEST_WEIGHT)
        size += weight
        seam = 2 * size >= part_bytes and _position(file) * part_bytes < 2 * weight
        if seam or size >= 2 * part_bytes or len(group) == _MOST_FILES:
            yield _whole(group)
            group, size = [], 0
    if group:
        yield _whole(group)


def ranges(length: int, count: int) -> list[tuple[int, int]]:
    """`count` ranges of nearly equal length that make up 0 to `length`."""
    edges = [length * number // count for number in range(count + 1)]
    return list(itertools.pairwise(edges))


def list_files(format: str, source: str) -> list[SourceFile]:
    """The files of a corpus sorted by their path below it, hidden ones left out."""
    if format == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        excluded = {"site-packages", "dist-packages", "__pycache__"}
        paths = _walk(root, lambda path: path.suffix == ".py" and not excluded & set(path.relative_to(root).parts))
        return [describe(path, name := path.relative_to(root).as_posix(), name) for path in paths]
    wanted, kind = _WANTED[format]
    path = Path(source).expanduser()
    if path.is_file():
        return [describe(path, path.name, str(path))]
    if not path.is_dir():
        raise DataError(f"{source} does not exist: give a file or a folder of {kind}")
    paths = _walk(path, wanted)
    if not paths:
        raise DataError(f"{source} holds no {kind}: give a folder that has some")
    return [describe(item, item.relative_to(path).as_posix(), str(item)) for item in paths]


def describe(path: Path, name: str, shown: str) -> SourceFile:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{shown} cannot be read ({error.strerror}): repair or remove it") from error
    return SourceFile(str(path), name, shown, status.st_size, status.st_mtime_ns)


def check_unchanged(part: Part) -> None:
    """Raise DataError when a file of the part is no longer the one that was listed."""
    for file in part.files:
        if describe(Path(file.path), file.name, file.shown) != file:
            raise DataError(f"{file.shown} changed while it was read: run this again when nobody writes to it")


_WANTED: dict[str, tuple[Callable[[Path], bool], str]] = {
    "text": (lambda path: True, "readable files"),
    "jsonl": (lambda path: path.name.endswith(JSONL_SUFFIXES), "JSONL files (.jsonl, .gz, .zst)"),
    "parquet": (lambda path: path.suffix == ".parquet", "Parquet files (.parquet)"),
}


def _walk(root: Path, wanted: Callable[[Path], bool]) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    kept = [path for path in found if wanted(path) and path.is_file()]
    return sorted(kept, key=lambda path: path.relative_to(root).as_posix())


def _cut_file(format: str, file: SourceFile, part_bytes: int) -> Iterator[Part]:
    if format == "jsonl" and not file.path.endswith(_COMPRESSED):
        pieces = ranges(file.size_bytes, max(1, file.size_bytes // part_bytes))
    elif format == "parquet":
        from titans_data import arrow

        pieces = arrow.cut_parquet(file, part_bytes)
    else:
        pieces = [(0, 0)]
    if len(pieces) == 1:
        yield _whole([file])
        return
    sizes = [end - start for start, end in ranges(file.size_bytes, len(pieces))]
    for (start, stop), size in zip(pieces, sizes, strict=True):
        yield Part((file,), size, start, stop)


def _whole(files: list[SourceFile]) -> Part:
    return Part(tuple(files), sum(file.size_bytes for file in files))


def _position(file: SourceFile) -> float:
    """A hash of the name, 0 to below 1."""
    return int.from_bytes(hashlib.sha256(file.name.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64
