"""The files of remote datasets on this node: shared by all its processes and runs, and bounded in size.

    objects/SHA256.EXT             files as their cards describe them, named by their content
    incoming/BYTES-PID-RANDOM/     downloads at work, each holding a flock on the file `lock` in its folder
    locks/XX                       held for the download of an object whose name starts so
    lock                           held while files are counted, removed or put in place

Whatever is killed at whatever moment leaves nothing that anybody waits for or reads: locks end with their processes,
objects appear whole, and a folder in `incoming` that nobody holds is removed by the next who makes room.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from titans_data.card import FileCard
from titans_data.errors import DataError
from titans_data.locks import locked, release_lock, take_lock
from titans_data.remote import disk_full

log = logging.getLogger(__name__)
T = TypeVar("T")

DEFAULT_CACHE_BYTES = 64 * 2**30
_TOUCH_EVERY_S = 60.0
_AGAIN_WITHIN_S = 600.0
_POLL_S = 0.05
_LEAST_ROOM = 1 << 20


def default_cache() -> Path:
    return Path(tempfile.gettempdir()) / f"titans_data-{os.getuid()}"


class ShardCache:
    """A cache folder, kept within `limit_bytes` whenever this process adds to it.

    Least recently used files go first. A file that goes while another process reads it stays readable there. Other
    processes may keep the same folder within another limit.
    Raises DataError when the folder cannot be used.
    """

    def __init__(self, folder: str | Path | None = None, limit_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self.folder = default_cache() if folder is None else Path(folder).expanduser().absolute()
        self.limit_bytes = limit_bytes
        self._objects, self._incoming = self.folder / "objects", self.folder / "incoming"
        self._used: dict[str, float] = {}
        """When this process last marked an object as used, on time.monotonic; at most one entry per shard."""
        self._warned = False
        self._is_default = folder is None
        try:
            self._make_folders()
            with locked(self.folder / "lock"):
                self._sweep()
        except OSError as error:
            raise self._unusable(error) from error

    def check_limit(self, largest: int) -> None:
        """Raise DataError when two files of `largest` bytes, one read and one on its way, are more than the limit."""
        if self.limit_bytes < 2 * largest:
            raise DataError(
                f"the cache of remote data may have {self.limit_bytes} bytes and the largest file has {largest}: "
                f"give cache_bytes of at least {2 * largest}, room for two"
            )

    def open(self, file: FileCard, download: Callable[[Path], None]) -> int:
        """A descriptor of the file for reading, which the caller closes.

        When it is not here, `download` writes it to the path it is given and checks it. One process of the node does
        so while others that want the file wait. What `download` raises is passed on.
        """
        descriptor = self._open_object(file)
        if descriptor is not None:
            return descriptor
        self._warn_of_return(file)
        try:
            self._make_folders()
            with locked(self.folder / "locks" / file.sha256[:2]):
                descriptor = self._open_object(file)
                if descriptor is None:
                    descriptor = self.with_room(file.size_bytes, lambda own: self._bring(file, own, download))
                return descriptor
        except OSError as error:
            raise self._unusable(error) from error

    def discard_damaged(self, file: FileCard) -> bool:
        """Whether the file is here with another content than on its card; if so it is removed."""
        path = Path(self._object(file))
        try:
            with path.open("rb") as content:
                if hashlib.file_digest(content, "sha256").hexdigest() == file.sha256:
                    return False
            path.unlink()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._unusable(error) from error
        self._used.pop(file.sha256, None)
        return True

    def with_room(self, size_bytes: int, work: Callable[[Path], T]) -> T:
        """`work` in a folder of its own in which `size_bytes` fit, and again from the start when the disk was full.

        Raises DataError when there is no room and nothing left to remove.
        """
        shortage = 0
        while True:
            try:
                own, lock = self._reserve(size_bytes, shortage)
                try:
                    return work(own)
                finally:
                    shutil.rmtree(own, ignore_errors=True)
                    release_lock(lock)
            except OSError as error:
                if disk_full(error) is None:
                    raise
                shortage = max(size_bytes, _LEAST_ROOM)

    def _bring(self, file: FileCard, own: Path, download: Callable[[Path], None]) -> int:
        """Download the file and put it in place; a descriptor, taken first: others may need its place at once."""
        path = own / "file"
        download(path)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.utime(descriptor)
            self._used[file.sha256] = time.monotonic()
            with locked(self.folder / "lock"):
                path.rename(self._object(file))
                shutil.rmtree(own, ignore_errors=True)  # so that its bytes do not count twice
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _open_object(self, file: FileCard) -> int | None:
        try:
            descriptor = os.open(self._object(file), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable(error) from error
        if os.fstat(descriptor).st_size != file.size_bytes:  # as after a power failure
            os.close(descriptor)
            Path(self._object(file)).unlink(missing_ok=True)
            return None
        now = time.monotonic()
        if now - self._used.get(file.sha256, -_TOUCH_EVERY_S) >= _TOUCH_EVERY_S:
            self._used[file.sha256] = now
            with suppress(OSError):  # another user's object
                os.utime(descriptor)
        return descriptor

    def _reserve(self, size_bytes: int, shortage: int) -> tuple[Path, int]:
        """A new folder in `incoming`, locked, after removing objects for `size_bytes` and at least `shortage` bytes."""
        while True:
            with locked(self.folder / "lock"):
                reserved = self._sweep()
                objects = self._list_objects()
                free = shutil.disk_usage(self.folder).free
                used = sum(size for _, size, _ in objects)
                excess = max(used + reserved + size_bytes - self.limit_bytes, size_bytes - free, shortage)
                if excess <= used:
                    while excess > 0:
                        _, size, path = objects.pop()
                        path.unlink(missing_ok=True)
                        excess -= size
                    own = self._incoming / f"{size_bytes}-{os.getpid()}-{secrets.token_hex(8)}"
                    own.mkdir()
                    lock = take_lock(own / "lock")
                    assert lock is not None
                    return own, lock
            if not reserved:
                raise DataError(
                    f"the disk of {self.folder} is full ({free} bytes free, {max(size_bytes, shortage)} needed, no "
                    "cached file left to remove): free some space, or put the cache on another disk"
                )
            time.sleep(_POLL_S)  # others are about to finish files that can be removed then

    def _sweep(self) -> int:
        """Remove the downloads that nobody is at any more; the bytes reserved by the others. Under the lock."""
        reserved = 0
        for own in self._incoming.iterdir():
            if not (own / "lock").exists():  # killed before it was locked, which happens under the same lock as this
                shutil.rmtree(own, ignore_errors=True)
                continue
            try:
                lock = take_lock(own / "lock", wait=False)
            except FileNotFoundError:  # done just now
                continue
            if lock is None:
                reserved += int(own.name.partition("-")[0])
            else:
                shutil.rmtree(own, ignore_errors=True)
                release_lock(lock)
        return reserved

    def _list_objects(self) -> list[tuple[float, int, Path]]:
        """(time of use, bytes, path) of every object, the most recently used first."""
        found = []
        with os.scandir(self._objects) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    info = entry.stat()
                    found.append((info.st_mtime, info.st_size, Path(entry.path)))
        return sorted(found, reverse=True)

    def _warn_of_return(self, file: FileCard) -> None:
        used = self._used.get(file.sha256)
        if used is None or self._warned or time.monotonic() - used > _AGAIN_WITHIN_S:
            return
        self._warned = True
        log.warning(
            "%s was used %.0f s ago and has to be downloaded again: cache_bytes=%d or the disk of %s is smaller than "
            "the working set, make it larger",
            file.name,
            time.monotonic() - used,
            self.limit_bytes,
            self.folder,
        )

    def _object(self, file: FileCard) -> str:
        """Its path, as a text: to make a Path takes longer than to open the file."""
        return f"{self._objects}/{file.sha256}{os.path.splitext(file.name)[1]}"  # noqa: PTH122

    def _make_folders(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._is_default:
            _check_own(self.folder)
        for folder in (self._objects, self._incoming, self.folder / "locks"):
            folder.mkdir(exist_ok=True)

    def _unusable(self, error: OSError) -> DataError:
        return DataError(
            f"the cache folder {self.folder} cannot be used ({error}): repair or remove it, or name another"
        )


def _check_own(folder: Path) -> None:
    """Raise DataError when the folder, in a place where all may write, was made by somebody else."""
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
        raise DataError(f"{folder} is not a folder of this user: remove it, or name another cache folder")
