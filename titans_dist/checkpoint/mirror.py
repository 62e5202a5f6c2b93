"""A copy of every checkpoint elsewhere: in a bucket, or another folder.

    ADDRESS/step_00000020/...                   the files of the store's folder
    ADDRESS/step_00000020/manifest.json         sent after them: without it there is no checkpoint
    ADDRESS/latest                              "step_00000020", sent last

Nothing is ever removed there: give the bucket a lifecycle rule, or tidy the folder yourself.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from titans_dist.checkpoint.store import LATEST, MANIFEST, Entry, Store, entry, parse_manifest, step_of
from titans_dist.config.errors import CheckpointError

ATTEMPTS = 4
FIRST_WAIT_S = 2.0
"""Before the second attempt to send or fetch a file; later waits are longer."""

_THREADS = 8


def upload(store: Store, step: int, address: str) -> None:
    """Copy the committed checkpoint of `step` to an address: s3://bucket/folder or another URL, or a folder.

    Each file is tried several times. Raises CheckpointError naming the file that could not be sent.
    """
    folder, address = store.folder(step), address.rstrip("/")
    names = sorted(store.manifest(step)["files"])
    _send(folder, [*names, MANIFEST], f"{address}/{folder.name}")
    with tempfile.TemporaryDirectory() as beside:
        (Path(beside) / LATEST).write_text(folder.name + "\n", encoding="utf-8")
        _send(Path(beside), [LATEST], address)


def restore(store: Store, address: str, warn: Callable[[str], None]) -> int | None:
    """Fetch the newest checkpoint of an address into a store and commit it there; its step, or None if there is none.

    `warn` gets a sentence that says so. Raises CheckpointError where the address cannot be read, which is not the same
    as having no checkpoint, or where what lies there is damaged.
    """
    manifest = newest(address)
    if manifest is None:
        return None
    step: int = manifest["step"]
    where = f"{address.rstrip('/')}/{store.folder(step).name}"
    warn(f"step {step} is fetched from {address.rstrip('/')}")
    files: dict[str, Entry] = manifest["files"]
    folder = store.begin(step)
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(lambda name: _fetch_whole(where, name, folder, files[name]), files):
                pass
        said = {key: manifest[key] for key in ("permanent", "digests", "files")}
        store.commit(step, manifest["meta"], **said)
    except Exception:
        store.abort(step)
        raise
    return step


def newest(address: str) -> dict[str, Any] | None:
    """The manifest of the newest checkpoint of an address; None, and raises, as `restore` does."""
    address = address.rstrip("/")
    with tempfile.TemporaryDirectory() as beside:
        path = Path(beside) / LATEST
        if not _fetch(address, LATEST, path):
            return None
        name = path.read_text(encoding="utf-8").strip()
        step = step_of(name)
        if step is None:
            raise CheckpointError(f"{address}/{LATEST} names no checkpoint ({name!r}): write step_<number> into it")
        where, path = f"{address}/{name}", Path(beside) / MANIFEST
        if not _fetch(where, MANIFEST, path):
            raise CheckpointError(f"{where} has no {MANIFEST}: write the name of a checkpoint into {address}/{LATEST}")
        return parse_manifest(path.read_text(encoding="utf-8"), step, where)


def _send(folder: Path, names: list[str], address: str) -> None:
    """Copy files of a folder to an address, in that order."""
    client: Any = None
    for name in names:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                client = client or _sender(folder, address)
                client(name)
                break
            except Exception as error:
                client = None  # streaming's client for S3 does not recover from every error
                if attempt == ATTEMPTS:
                    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                    raise CheckpointError(
                        f"{address}/{name} could not be written in {ATTEMPTS} attempts ({reason}): check "
                        "checkpoint.mirror, its credentials and the way there"
                    ) from error
                time.sleep(FIRST_WAIT_S * 2 ** (attempt - 1))


def _sender(folder: Path, address: str) -> Callable[[str], None]:
    path = _path(address)
    if path is not None:
        return lambda name: _copy(folder / name, path / name)
    from titans_data._imports import import_extra, import_streaming

    import_streaming()
    module = import_extra("streaming.base.storage.upload")
    # It warns that the local folder is not empty, which is the point.
    logging.getLogger(module.__name__).setLevel(logging.ERROR)
    uploader = module.CloudUploader.get((str(folder), address), keep_local=True, exist_ok=True, retry=1)
    send: Callable[[str], None] = uploader.upload_file
    return send


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    shutil.copyfile(source, temporary)
    temporary.replace(target)


def _fetch_whole(address: str, name: str, folder: Path, expected: Entry) -> None:
    """Fetch a file of a checkpoint, and bring it to the disk."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise CheckpointError(f"{address}/{MANIFEST} names a file outside of the checkpoint: {name}")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if not _fetch(address, name, folder / name, expected):
        raise CheckpointError(
            f"{address}/{name} is missing: write the name of another checkpoint into `{LATEST}` there"
        )


def _fetch(address: str, name: str, target: Path, expected: Entry | None = None) -> bool:
    """Copy a file from an address; whether there was one. Raises CheckpointError where it is not as `expected`."""
    path = _path(address)
    if path is not None:
        if not (path / name).is_file():
            return False
        shutil.copyfile(path / name, target)
        if expected is not None and entry(target) != expected:
            raise CheckpointError(f"{path / name} is damaged: it is not the file that its {MANIFEST} describes")
        return True
    from titans_data.errors import DataError
    from titans_data.remote import Damaged, MissingFile, Remote, Retries

    def check(arrived: Path) -> None:
        if expected is not None and entry(arrived) != expected:
            raise Damaged(f"is not the file that its {MANIFEST} describes")

    try:
        Remote(address, Retries(ATTEMPTS, FIRST_WAIT_S)).download(name, target, check)
    except MissingFile:
        return False
    except DataError as error:
        raise CheckpointError(str(error)) from error
    return True


def _path(address: str) -> Path | None:
    """The folder that an address is, if it is one."""
    if "://" not in address:
        return Path(address)
    parts = urlsplit(address)
    return Path(url2pathname(parts.path)) if parts.scheme == "file" else None
