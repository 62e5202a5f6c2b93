"""The commit protocol of checkpoints on a local or shared POSIX folder.

A checkpoint is written into ``step_00000010.tmp/``. ``commit`` adds ``manifest.json`` (every file's size and SHA-256),
brings everything to the disk and renames the folder to ``step_00000010/``. The rename is atomic, so at every moment,
also after a kill or a power cut, a folder without ``.tmp`` is whole. ``latest`` names the newest for people and tools;
nothing here trusts it.

    root/
      latest                     "step_00000020"
      step_00000010/manifest.json, ...
      step_00000020/manifest.json, ...
      step_00000030.tmp/         a save in progress, or the leftover of a killed one

Only one process at a time may change a store. Methods that write raise OSError when the folder cannot be written.
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

from titans_dist.config.errors import CheckpointError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LATEST = "latest"

_HASH_THREADS = 8
_HASH_BLOCK_BYTES = 4 << 20
_STEP_FOLDER = re.compile(r"step_(\d{8,})")


class Store:
    """The checkpoints below one folder, which is made by the first ``begin``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._committed_here: set[int] = set()  # hashed by this process a moment ago; prune need not read them again

    def folder(self, step: int) -> Path:
        """The folder of a committed step, whether it exists or not."""
        return self.root / f"step_{step:08d}"

    def begin(self, step: int) -> Path:
        """Make a clean folder for the files of ``step`` and return it; a leftover of the same step is removed."""
        temporary = self._temporary(step)
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        return temporary

    def commit(self, step: int, meta: dict[str, Any]) -> Path:
        """Make what was written since ``begin(step)`` the checkpoint of ``step``; ``meta`` must be JSON.

        A checkpoint of the same step (of a run that went back and came here again) is replaced.
        """
        temporary, final = self._temporary(step), self.folder(step)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        with ThreadPoolExecutor(_HASH_THREADS) as pool:
            entries = list(pool.map(_entry_on_disk, files))
        manifest = {
            "format": FORMAT_VERSION,
            "step": step,
            "meta": meta,
            "files": {str(path.relative_to(temporary)): entry for path, entry in zip(files, entries, strict=True)},
        }
        _write_synced(temporary / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False))
        for folder in [*(path for path in temporary.rglob("*") if path.is_dir()), temporary]:
            _sync(folder)
        doomed = self._move_aside(final) if final.exists() else None
        temporary.rename(final)
        _sync(self.root)
        if doomed is not None:
            shutil.rmtree(doomed)
        self._committed_here.add(step)
        _write_synced(self.root / f"{LATEST}.tmp", final.name + "\n")
        (self.root / f"{LATEST}.tmp").replace(self.root / LATEST)
        _sync(self.root)
        return final

    def abort(self, step: int) -> None:
        """Remove what was written since ``begin(step)``."""
        if self._temporary(step).exists():
            shutil.rmtree(self._temporary(step))

    def committed(self) -> list[int]:
        """The steps with a readable manifest, oldest first."""
        steps = []
        for step, folder in self._step_folders():
            try:
                self._manifest(step)
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
        files: dict[str, dict[str, Any]] = self._manifest(step)["files"]
        for name, entry in files.items():
            if not (folder / name).is_file():
                raise CheckpointError(f"checkpoint {folder} is damaged: {name} is missing")
            size_bytes = (folder / name).stat().st_size
            if size_bytes != entry["size"]:
                raise CheckpointError(
                    f"checkpoint {folder} is damaged: {name} has {size_bytes} bytes instead of {entry['size']}"
                )
        if not digests:
            return
        with ThreadPoolExecutor(_HASH_THREADS) as pool:
            found = pool.map(lambda name: _sha256(folder / name), files)
            for name, digest in zip(files, found, strict=True):
                if digest != files[name]["sha256"]:
                    raise CheckpointError(f"checkpoint {folder} is damaged: the content of {name} has changed")

    def newest_valid(self, warn: Callable[[str], None]) -> int | None:
        """The newest step whose files verify, or None; ``warn`` gets one sentence for each thing passed over."""
        for leftover in self.leftovers():
            warn(f"{leftover} is the leftover of an interrupted save or has no readable {MANIFEST}; it is ignored")
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
        meta: dict[str, Any] = self._manifest(step)["meta"]
        return meta

    def prune(self, keep: int) -> None:
        """Remove all but the ``keep`` newest checkpoints, but never the newest valid one, and old ``.tmp`` leftovers.

        A ``.tmp`` newer than the newest checkpoint may be a save in progress and stays.
        """
        if keep < 1:
            raise ValueError(f"keep is {keep}, but at least one checkpoint must stay")
        steps = self.committed()
        kept = steps[-keep:]
        if len(kept) < len(steps) and not any(self._is_valid(step) for step in reversed(kept)):
            kept += [step for step in reversed(steps[:-keep]) if self._is_valid(step)][:1]
        for step in steps:
            if step not in kept:
                shutil.rmtree(self._move_aside(self.folder(step)))
        for step, path in self._temporaries():
            if steps and step <= steps[-1]:
                shutil.rmtree(path)

    def _temporary(self, step: int) -> Path:
        return self.root / f"step_{step:08d}.tmp"

    def _step_folders(self) -> list[tuple[int, Path]]:
        return self._matching(_STEP_FOLDER)

    def _temporaries(self) -> list[tuple[int, Path]]:
        return self._matching(re.compile(_STEP_FOLDER.pattern + r"(?:\.old)?\.tmp"))

    def _matching(self, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
        if not self.root.is_dir():
            return []
        matches = [(pattern.fullmatch(path.name), path) for path in self.root.iterdir() if path.is_dir()]
        return sorted((int(match[1]), path) for match, path in matches if match)

    def _manifest(self, step: int) -> dict[str, Any]:
        path = self.folder(step) / MANIFEST
        try:
            manifest: dict[str, Any] = json.loads(path.read_text())
            version, complete = manifest["format"], {"step", "meta", "files"} <= manifest.keys()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{self.folder(step)} is not a checkpoint: {MANIFEST} cannot be read") from None
        if version != FORMAT_VERSION or not complete or manifest["step"] != step:
            raise CheckpointError(f"{path} is of format {version!r}; this version reads format {FORMAT_VERSION}")
        return manifest

    def _is_valid(self, step: int) -> bool:
        try:
            self.verify(step, digests=step not in self._committed_here)
        except (CheckpointError, OSError):
            return False
        return True

    def _move_aside(self, final: Path) -> Path:
        """Rename a committed folder before its files go, so that a kill in between leaves no half checkpoint."""
        doomed = final.with_name(final.name + ".old.tmp")
        if doomed.exists():
            shutil.rmtree(doomed)
        final.rename(doomed)
        _sync(self.root)
        return doomed


def _entry_on_disk(path: Path) -> dict[str, Any]:
    """The manifest's entry of a file, after the file has reached the disk."""
    _sync(path)
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest, buffer = hashlib.sha256(), bytearray(_HASH_BLOCK_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


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
