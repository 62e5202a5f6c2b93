"""The folder in which a dataset is made: what is finished stays, whoever is killed.

<out>.tmp/
    scan/<key>/        per part: a report, a piece of the sample, the hashes of the documents
    tokenizer/<key>/   what `load_tokenizer` reads
    duplicates/<key>/  which documents of which part are left out
    tokens/<key>/      per part: a report and the MDS shards of each split
    unfinished/        what is being written
    dataset/           the result, before it takes its own name

A result is written in `unfinished` and takes its place by one rename. Its key is a digest of everything that its bytes
depend on, so that a later prepare uses what is still right and nothing else.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from titans_data.errors import DataError

REPORT_NAME = "report.json"
_UNFINISHED = "unfinished"
_WORKERS = "workers"
_LAYOUT = 1
_ORPHANS_LEAVE_WITHIN_S = 60.0


def key_of(*content: Any) -> str:
    """A digest of anything that JSON can spell."""
    text = json.dumps([_LAYOUT, *content], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Work:
    """The results in a work folder, by stage and key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def place(self, stage: str, key: str) -> Path:
        return self.folder / stage / key

    def report(self, stage: str, key: str) -> dict[str, Any] | None:
        """The report of a finished result, None when there is none or a file of it is not whole."""
        place = self.place(stage, key)
        try:
            report = json.loads((place / REPORT_NAME).read_text(encoding="utf-8"))
            whole = all((place / name).stat().st_size == size for name, size in report["files"].items())
        except (OSError, ValueError):
            whole = False
        if not whole:
            shutil.rmtree(place, ignore_errors=True)
            return None
        return report["content"]

    @contextmanager
    def committing(self, stage: str, key: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        """An empty folder to write a result to, and its report to fill; both are in place after the block."""
        (self.folder / stage).mkdir(exist_ok=True)
        (self.folder / _UNFINISHED).mkdir(exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{stage}-", dir=self.folder / _UNFINISHED))
        try:
            content: dict[str, Any] = {}
            yield unfinished, content
            files = {path.relative_to(unfinished).as_posix(): path.stat().st_size for path in _files(unfinished)}
            text = json.dumps({"files": files, "content": content})
            (unfinished / REPORT_NAME).write_text(text, encoding="utf-8")
            sync_tree(unfinished)
            unfinished.rename(self.place(stage, key))
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


@contextmanager
def claimed(folder: Path, out: Path) -> Iterator[Work]:
    """Make `folder` the work folder of this process alone; the claim dies with the process."""
    folder.mkdir(exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous owner may have removed the folder after it was opened here.
            ours = folder.exists() and os.path.samestat(os.fstat(handle), folder.stat())
        except BlockingIOError:
            ours = False
        if not ours:
            raise DataError(f"another process is preparing {out}: wait until it is done, then run this again")
        _wait_for_orphans(folder, out)
        shutil.rmtree(folder / _UNFINISHED, ignore_errors=True)
        yield Work(folder)
    finally:
        os.close(handle)


def join_workers(folder: Path) -> int:
    """Register this process as one that writes to the work folder for as long as it lives."""
    handle = os.open(folder / _WORKERS, os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_SH)
    return handle


def _wait_for_orphans(folder: Path, out: Path) -> None:
    """The workers of a prepare that was killed leave by themselves; until then they may still write."""
    handle = os.open(folder / _WORKERS, os.O_RDWR | os.O_CREAT)
    try:
        deadline = time.monotonic() + _ORPHANS_LEAVE_WITHIN_S
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            if time.monotonic() > deadline:
                raise DataError(
                    f"worker processes of an earlier prepare of {out} still run: end them, then run this again"
                )
            time.sleep(0.05)
    finally:
        os.close(handle)


def link(source: Path, target: Path) -> None:
    """Give a file a second name, or a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
        sync(target)


def sync_tree(folder: Path) -> None:
    """Bring a folder with all its content to the disk."""
    for path in _files(folder):
        sync(path)
    for below in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        sync(below)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
