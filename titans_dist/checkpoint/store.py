"""The commit protocol of checkpoints on a local or shared POSIX folder.

A checkpoint is written into ``step_00000010.<incarnation>.tmp/``. ``commit`` adds ``manifest.json`` (every file's size
and SHA-256), brings everything to the disk and renames the folder to ``step_00000010/``. The rename is atomic, so at
every moment, also after a kill or a power cut, a folder without ``.tmp`` is whole. ``latest`` names the newest for
people and tools; nothing here trusts it.

    root/
      latest                              "step_00000020"
      lease.json                          which start of the run may write here (see `lease`)
      step_00000010/manifest.json, ...
      step_00000020/manifest.json, ...
      step_00000030.8f14e45f.tmp/         a save in progress, or the leftover of a killed one

Only one process at a time may change a store. One with a lease finds out when another has taken over; its temporary
folders are its own, so that two never mix their files. Methods that write raise OSError when the folder cannot be
written, and FencedError when the lease is another's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from titans_dist.checkpoint.lease import Lease
from titans_dist.checkpoint.retention import removable
from titans_dist.config.errors import CheckpointError

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
LATEST = "latest"

_SEAL = "sha256"
_HASH_THREADS = 8
_STEP_FOLDER = re.compile(r"step_(\d{8,})")
_TEMPORARY = re.compile(r"step_(\d{8,})(?:\.([0-9a-f]{8}))?(?:\.(old|replaced))?\.tmp")

Entry = dict[str, Any]
"""What the manifest says of a file: `size` in bytes and `sha256`."""


class Store:
    """The checkpoints below one folder, which is made by the first ``begin``."""

    def __init__(self, root: Path, lease: Lease | None = None) -> None:
        self.root = root
        self.lease = lease
        """The right to write; without one, the caller knows that nobody else does."""
        self._committed_here: set[int] = set()  # hashed by this process a moment ago; prune need not read them again

    def folder(self, step: int) -> Path:
        """The folder of a committed step, whether it exists or not."""
        return self.root / f"step_{step:08d}"

    def begin(self, step: int) -> Path:
        """Make a clean folder for the files of ``step`` and return it.

        A leftover of the same step is removed, and those of earlier starts: nobody may commit them any more.
        """
        self.check_lease()
        temporary = self._temporary(step)
        for path in self._leftovers_of_others():
            shutil.rmtree(path)
        for path in self.root.glob(f"{LATEST}*.tmp"):
            path.unlink(missing_ok=True)
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        return temporary

    def commit(
        self,
        step: int,
        meta: dict[str, Any],
        *,
        permanent: bool = False,
        digests: dict[str, str] | None = None,
        files: dict[str, Entry] | None = None,
    ) -> Path:
        """Make what was written since ``begin(step)`` the checkpoint of ``step``; ``meta`` must be JSON.

        A ``permanent`` one is never pruned. ``digests`` of what it holds are kept for the comparison with the next.
        ``files`` are the entries of all files, where those who wrote them have hashed them and brought them to the
        disk; otherwise that is done here. Raises CheckpointError where such a file is not there or of another size.
        A checkpoint of the same step (of a run that went back and came here again) is replaced.
        """
        self.check_lease()
        temporary, final = self._temporary(step), self.folder(step)
        if files is None:
            files = entries(temporary)
        else:
            _check_sizes(temporary, files, f"is not in {temporary} as this process sees it")
        manifest = {
            "format": FORMAT_VERSION,
            "step": step,
            "permanent": permanent,
            "meta": meta,
            "digests": digests or {},
            "files": files,
        }
        _write_synced(temporary / MANIFEST, sealed(manifest))
        # Written beforehand, so that a disk that is full by now makes the commit fail as a whole.
        latest = self._latest_beforehand()
        _write_synced(latest, final.name + "\n")
        for folder in [*(path for path in temporary.rglob("*") if path.is_dir()), temporary]:
            _sync(folder)
        self.check_lease()
        replaced = self._move_aside(final, "replaced") if final.exists() else None
        temporary.rename(final)
        _sync(self.root)
        if replaced is not None:
            shutil.rmtree(replaced)
        self._committed_here.add(step)
        self.check_lease()
        latest.replace(self.root / LATEST)
        _sync(self.root)
        return final

    def check_lease(self) -> None:
        """Raise FencedError when another start may write here by now."""
        if self.lease is not None:
            self.lease.check()

    def abort(self, step: int) -> None:
        """Remove what was written since ``begin(step)``."""
        temporary = self._temporary(step)
        self._latest_beforehand().unlink(missing_ok=True)
        if temporary.exists():
            shutil.rmtree(temporary)

    def committed(self) -> list[int]:
        """The steps with a readable manifest, oldest first."""
        steps = []
        for step, folder in self._step_folders():
            try:
                self.manifest(step)
            except CheckpointError:
                continue
            if folder == self.folder(step):
                steps.append(step)
        return sorted(steps)

    def leftovers(self) -> list[Path]:
        """What looks like a checkpoint and is none: ``.tmp`` folders, and step folders without a readable manifest."""
        whole = set(self.committed())
        broken = [folder for step, folder in self._step_folders() if step not in whole]
        return sorted(broken + [path for _, path in self._temporaries()])

    def verify(self, step: int, digests: bool = True) -> None:
        """Compare the files of ``step`` with its manifest: their sizes and, with ``digests``, their contents.

        Raises CheckpointError naming the first file that is missing, cut short or changed.
        """
        folder = self.folder(step)
        files: dict[str, Entry] = self.manifest(step)["files"]
        _check_sizes(folder, files, "is missing", f"checkpoint {folder} is damaged: ")
        if not digests:
            return
        with ThreadPoolExecutor(_HASH_THREADS) as pool:
            found = pool.map(lambda name: sha256(folder / name), files)
            for name, digest in zip(files, found, strict=True):
                if digest != files[name]["sha256"]:
                    raise CheckpointError(f"checkpoint {folder} is damaged: the content of {name} has changed")

    def newest_valid(self, warn: Callable[[str], None]) -> int | None:
        """The newest step whose files verify, or None; ``warn`` gets one sentence for each thing passed over."""
        if self.lease is not None:
            self._put_back_replaced()
        for leftover in self.leftovers():
            warn(f"{leftover} is the leftover of an interrupted save or has no sound {MANIFEST}; it is ignored")
        for step in reversed(self.committed()):
            try:
                self.verify(step)
            except (CheckpointError, OSError) as error:
                warn(f"{error}; trying the one before it")
                continue
            return step
        return None

    def meta(self, step: int) -> dict[str, Any]:
        """What was given to ``commit(step, meta)``; raises CheckpointError where there is no such checkpoint."""
        meta: dict[str, Any] = self.manifest(step)["meta"]
        return meta

    def manifest(self, step: int) -> dict[str, Any]:
        """The whole ``manifest.json``: format, step, permanent, meta, digests, files. Raises as ``meta`` does."""
        folder = self.folder(step)
        try:
            text = (folder / MANIFEST).read_text(encoding="utf-8")
        except (OSError, ValueError):
            raise CheckpointError(f"{folder} is not a checkpoint: {MANIFEST} cannot be read") from None
        return parse_manifest(text, step, str(folder))

    def digest(self, step: int) -> str:
        """sha256 of the manifest, and so of everything in the checkpoint: no other has the same."""
        return _digest(self.manifest(step))

    def plan(self, keep: int) -> list[int]:
        """The steps that ``prune(keep)`` would remove, oldest first."""
        steps = self.committed()
        permanent = {step for step in steps if self.manifest(step)["permanent"]}
        return removable(steps, permanent, keep, self._is_valid)

    def prune(self, keep: int) -> list[int]:
        """Remove old checkpoints and ``.tmp`` leftovers; returns the steps removed.

        The ``keep`` newest stay, those that are permanent, and the newest valid one. A ``.tmp`` newer than the newest
        checkpoint may be a save in progress and stays.
        """
        self.check_lease()
        doomed = self.plan(keep)
        for step in doomed:
            self._remove(step)
        newest = max(self.committed(), default=-1)
        for step, path in self._temporaries():
            if step <= newest:
                shutil.rmtree(path)
        return doomed

    def discard_after(self, step: int) -> None:
        """Remove all checkpoints later than ``step``, permanent ones too: the run has gone back there."""
        self.check_lease()
        for later in reversed([later for later in self.committed() if later > step]):
            self._remove(later)
        _write_synced(self._latest_beforehand(), self.folder(step).name + "\n")
        self._latest_beforehand().replace(self.root / LATEST)
        _sync(self.root)

    def _temporary(self, step: int) -> Path:
        return self.root / f"step_{step:08d}{self._suffix()}"

    def _latest_beforehand(self) -> Path:
        return self.root / f"{LATEST}{self._suffix()}"

    def _suffix(self) -> str:
        return ".tmp" if self.lease is None else f".{self.lease.incarnation}.tmp"

    def _step_folders(self) -> list[tuple[int, Path]]:
        return self._matching(_STEP_FOLDER)

    def _temporaries(self) -> list[tuple[int, Path]]:
        return self._matching(_TEMPORARY)

    def _leftovers_of_others(self) -> list[Path]:
        """Temporary folders of other incarnations, which the lease says are dead or fenced off."""
        if self.lease is None:
            return []
        matches = [(_TEMPORARY.fullmatch(path.name), path) for _, path in self._temporaries()]
        return [path for match, path in matches if match and match[2] not in (None, self.lease.incarnation)]

    def _put_back_replaced(self) -> None:
        """A kill in the moment between two renames has left a step without its old and its new checkpoint."""
        self.check_lease()
        for step, path in self._temporaries():
            if path.name.endswith(".replaced.tmp") and not self.folder(step).exists():
                path.rename(self.folder(step))

    def _matching(self, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
        if not self.root.is_dir():
            return []
        matches = [(pattern.fullmatch(path.name), path) for path in self.root.iterdir() if path.is_dir()]
        return sorted((int(match[1]), path) for match, path in matches if match)

    def _is_valid(self, step: int) -> bool:
        try:
            self.verify(step, digests=step not in self._committed_here)
        except (CheckpointError, OSError):
            return False
        return True

    def _remove(self, step: int) -> None:
        shutil.rmtree(self._move_aside(self.folder(step), "old"))
        self._committed_here.discard(step)

    def _move_aside(self, final: Path, why: str) -> Path:
        """Rename a committed folder before its files go, so that a kill in between leaves no half checkpoint."""
        doomed = final.with_name(f"{final.name}.{why}.tmp")
        if doomed.exists():
            shutil.rmtree(doomed)
        final.rename(doomed)
        _sync(self.root)
        return doomed


def step_of(name: str) -> int | None:
    """The step that a folder of this name holds, if it is a checkpoint's."""
    match = _STEP_FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def sealed(manifest: dict[str, Any]) -> str:
    """The text of ``manifest.json``: with a digest of itself, since no other file vouches for it."""
    manifest = json.loads(json.dumps(manifest, allow_nan=False))  # as it will be read
    return json.dumps({**manifest, _SEAL: _digest(manifest)}, indent=1)


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def parse_manifest(text: str, step: int, where: str) -> dict[str, Any]:
    """The manifest of the folder `where`; raises CheckpointError where it is none that this version understands."""
    try:
        manifest: dict[str, Any] = json.loads(text)
        version, complete = manifest["format"], {"step", "permanent", "meta", "digests", "files"} <= manifest.keys()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{where} is not a checkpoint: {MANIFEST} cannot be read") from None
    if version != FORMAT_VERSION or not complete or manifest["step"] != step:
        raise CheckpointError(
            f"{where}/{MANIFEST} is of format {version!r}; this version reads format {FORMAT_VERSION}"
        )
    if manifest.pop(_SEAL, None) != _digest(manifest):
        raise CheckpointError(f"checkpoint {where} is damaged: the content of {MANIFEST} has changed")
    return manifest


def entries(folder: Path) -> dict[str, Entry]:
    """The manifest's entry of every file below a folder, once all have reached the disk."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        found = list(pool.map(entry, paths))
    return {path.relative_to(folder).as_posix(): value for path, value in zip(paths, found, strict=True)}


def entry(path: Path) -> Entry:
    """The manifest's entry of a file, after the file has reached the disk."""
    _sync(path)
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def _check_sizes(folder: Path, files: dict[str, Entry], missing: str, prefix: str = "") -> None:
    for name, expected in files.items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{prefix}{name} {missing}")
        size_bytes = (folder / name).stat().st_size
        if size_bytes != expected["size"]:
            raise CheckpointError(f"{prefix}{name} has {size_bytes} bytes instead of {expected['size']}")


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    # Its buffer is small: of a large one every thread that has ever hashed would keep the memory.
    with path.open("rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
