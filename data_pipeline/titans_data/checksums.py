"""Every file of a dataset against its card, to the end: what is bad is told, not raised."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from titans_data.cache import DEFAULT_CACHE_BYTES
from titans_data.card import CARD_NAME, TOKENIZER_FOLDER, FileCard, dataset_fingerprint
from titans_data.errors import DataError
from titans_data.files import DatasetFiles, RemoteFiles, dataset_files
from titans_data.remote import Retries
from titans_data.tokenize import load_tokenizer


@dataclass(frozen=True)
class Checked:
    """A file that was read, or not, and what is wrong with it."""

    where: str
    size_bytes: int
    """On the card; 0 for the card itself and the tokenizer."""
    problem: str | None


class Checksums:
    """The check of one dataset, in a local folder or below a URL, whose files go through the cache.

    Raises DataError when its card cannot be read.
    """

    def __init__(
        self,
        folder: str | Path,
        cache: str | Path | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        retries: Retries | None = None,
    ) -> None:
        self._folder = Path(folder)
        self._files = dataset_files(folder, cache, cache_bytes, retries)
        self._card = self._files.card()
        self._of_splits = [file for split in self._card.splits.values() for file in (split.index, *split.shards)]
        self.size_bytes = sum(file.size_bytes for file in self._of_splits)

    def __len__(self) -> int:
        return len(self._of_splits) + 2

    def __iter__(self) -> Iterator[Checked]:
        """Read one file after the other."""
        whole = dataset_fingerprint(self._card.tokenizer_fingerprint, self._card.splits) == self._card.fingerprint
        yield Checked(self._files.where(CARD_NAME), 0, None if whole else "contradicts its own fingerprint")
        yield Checked(self._files.where(TOKENIZER_FOLDER), 0, self._tokenizer())
        for file in self._of_splits:
            yield Checked(self._files.where(file.name), file.size_bytes, _problem(self._files, file))

    def _tokenizer(self) -> str | None:
        try:
            files = self._files
            folder = files.copy_card_and_tokenizer() if isinstance(files, RemoteFiles) else self._folder
            found = load_tokenizer(folder / TOKENIZER_FOLDER).fingerprint
        except DataError as error:
            return f"cannot be read ({error})"
        return None if found == self._card.tokenizer_fingerprint else "is not the tokenizer on the card"


def _problem(files: DatasetFiles, file: FileCard) -> str | None:
    """What is wrong with a file; a copy in the cache that was damaged is downloaded again first."""
    try:
        problem = _difference(files, file)
        if problem is not None and files.restore(file):
            problem = _difference(files, file)
    except FileNotFoundError:
        return "is missing"
    except (DataError, OSError) as error:
        return f"cannot be read ({error})"
    return problem


def _difference(files: DatasetFiles, file: FileCard) -> str | None:
    with os.fdopen(files.open(file), "rb") as content:
        size = os.fstat(content.fileno()).st_size
        if size != file.size_bytes:
            return f"has {size:,} bytes, its card says {file.size_bytes:,}"
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return None if digest == file.sha256 else "does not have the sha256 on its card"
