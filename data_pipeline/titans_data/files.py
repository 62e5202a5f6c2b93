"""Where the files of a dataset are: in a folder of this machine, or on a remote with a cache between."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from titans_data.cache import DEFAULT_CACHE_BYTES, ShardCache
from titans_data.card import (
    CARD_NAME,
    TOKENIZER_FOLDER,
    DatasetCard,
    FileCard,
    SplitCard,
    check_sizes,
    load_card,
)
from titans_data.errors import DataError
from titans_data.remote import Damaged, Remote, Retries, is_url
from titans_data.tokenize import KIND_NAME, TOKENIZER_NAME, load_tokenizer


class DatasetFiles(Protocol):
    """The files of one dataset, for any thread of any process: it can be pickled and holds nothing open."""

    is_remote: bool

    def card(self) -> DatasetCard: ...

    def check(self, split: SplitCard) -> None:
        """Raise DataError when it is known beforehand that the files of the split cannot be read."""

    def open(self, file: FileCard) -> int:
        """A descriptor for reading, which the caller closes. OSError or DataError when there is none."""

    def fetch(self, file: FileCard) -> None:
        """Bring the file to this machine."""

    def restore(self, file: FileCard) -> bool:
        """Whether a file that cannot be understood was damaged here, and `open` gives another now."""

    def where(self, name: str = "") -> str:
        """How messages call the file `name`, or the dataset."""


class FolderFiles:
    is_remote = False

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)

    def card(self) -> DatasetCard:
        return load_card(self._folder)

    def check(self, split: SplitCard) -> None:
        check_sizes(self._folder, split)

    def open(self, file: FileCard) -> int:
        return os.open(f"{self._folder}/{file.name}", os.O_RDONLY | os.O_CLOEXEC)

    def fetch(self, file: FileCard) -> None:
        pass

    def restore(self, file: FileCard) -> bool:
        return False

    def where(self, name: str = "") -> str:
        return str(self._folder / name)


class RemoteFiles:
    is_remote = True

    def __init__(self, url: str, cache: ShardCache, retries: Retries | None = None) -> None:
        self._remote, self._cache = Remote(url, retries), cache

    def card(self) -> DatasetCard:
        return self._cache.with_room(0, self._load_card)

    def check(self, split: SplitCard) -> None:
        self._cache.check_limit(max(file.size_bytes for file in (split.index, *split.shards)))

    def open(self, file: FileCard) -> int:
        return self._cache.open(file, lambda path: self._remote.download(file.name, path, _check_content(file)))

    def fetch(self, file: FileCard) -> None:
        os.close(self.open(file))

    def restore(self, file: FileCard) -> bool:
        return self._cache.discard_damaged(file)

    def where(self, name: str = "") -> str:
        return self._remote.url_of(name) if name else self._remote.url

    def copy_card_and_tokenizer(self) -> Path:
        """A folder in the cache with the card and the tokenizer; equal ones are there once."""
        return self._cache.with_room(0, self._copy)

    def _copy(self, own: Path) -> Path:
        made = own / "folder"
        (made / TOKENIZER_FOLDER).mkdir(parents=True)
        card = self._load_card(made)
        digest = hashlib.sha256((made / CARD_NAME).read_bytes()).hexdigest()
        folder = self._cache.folder / "folders" / digest
        if _holds_tokenizer(folder, card):
            return folder
        kind = self._download_json(made, f"{TOKENIZER_FOLDER}/{KIND_NAME}")
        if not isinstance(kind, dict) or kind.get("kind") != "bytes":
            self._download_json(made, f"{TOKENIZER_FOLDER}/{TOKENIZER_NAME}")
        if not _holds_tokenizer(made, card):
            raise DataError(
                f"{self.where(TOKENIZER_FOLDER)} is not the tokenizer on the card: upload the dataset again"
            )
        folder.parent.mkdir(exist_ok=True)
        if folder.exists() and not _holds_tokenizer(folder, card):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            made.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process was faster
                raise
        return folder

    def _load_card(self, own: Path) -> DatasetCard:
        self._download_json(own, CARD_NAME)
        try:
            return load_card(own)
        except DataError as error:
            raise DataError(str(error).replace(str(own), self.where())) from error

    def _download_json(self, folder: Path, name: str) -> Any:
        content: Any = None

        def check(path: Path) -> None:
            nonlocal content
            try:
                content = json.loads(path.read_bytes())
            except ValueError:
                raise Damaged("is not JSON") from None

        self._remote.download(name, folder / name, check)
        return content


def _holds_tokenizer(folder: Path, card: DatasetCard) -> bool:
    try:
        return load_tokenizer(folder / TOKENIZER_FOLDER).fingerprint == card.tokenizer_fingerprint
    except DataError:
        return False


def _check_content(file: FileCard) -> Callable[[Path], None]:
    """A check that a downloaded file is the one on its card."""

    def check(path: Path) -> None:
        size = path.stat().st_size
        if size != file.size_bytes:
            raise Damaged(f"has {size} bytes, its card says {file.size_bytes}")
        with path.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != file.sha256:
                raise Damaged("does not have the sha256 on its card")

    return check


def dataset_files(
    folder: str | Path,
    cache: str | Path | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    retries: Retries | None = None,
) -> DatasetFiles:
    """The files of the dataset in a local folder or below a URL, which goes through the cache folder `cache`."""
    if is_url(folder):
        return RemoteFiles(str(folder), ShardCache(cache, cache_bytes), retries)
    return FolderFiles(folder)


def local_folder(
    folder: str | Path,
    cache: str | Path | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    retries: Retries | None = None,
) -> Path:
    """A local folder with the card and the tokenizer of a dataset: itself, or a copy in the cache for a URL.

    Raises DataError when they cannot be had.
    """
    if not is_url(folder):
        return Path(folder)
    return RemoteFiles(str(folder), ShardCache(cache, cache_bytes), retries).copy_card_and_tokenizer()
