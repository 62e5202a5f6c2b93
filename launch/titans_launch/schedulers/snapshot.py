"""The source code of a job, copied into its run folder: what it runs when the work tree has long gone on."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import titans_dist
from titans_launch.schedulers.job import SUBMIT

ROOTS = ("", "kernels", "launch", "data_pipeline")
"""Folders of the copy that packages are imported from."""
_PARTS = ("titans_dist", "kernels", "launch", "data_pipeline", "configs")


def take(run_dir: Path) -> Path | None:
    """Copy the work tree that `titans_dist` is imported from, with its commit and what differs from that.

    Writes submit/code/, submit/code.sha and submit/code.diff (in `git apply`'s form) and returns the first. None where
    the package is installed and no git work tree: then its version tells which code it was.
    """
    root, folder = Path(titans_dist.__file__).parents[1], run_dir / SUBMIT
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None or not (root / "pyproject.toml").exists():
        return None
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *_PARTS) or b""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "code.sha").write_bytes(commit)
    (folder / "code.diff").write_bytes(_git(root, "diff", "--binary", "HEAD") or b"")
    new, code = folder / "code.tmp", folder / "code"
    shutil.rmtree(new, ignore_errors=True)
    for name in listed.decode().split("\0"):
        source, target = root / name, new / name
        if name and (source.exists() or source.is_symlink()):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    shutil.rmtree(code, ignore_errors=True)
    new.rename(code)
    return code


def python_path(code: Path) -> str:
    """PYTHONPATH of a process that is to run the copy."""
    return ":".join(str(code / root) if root else str(code) for root in ROOTS)


def _git(root: Path, *arguments: str) -> bytes | None:
    """What git prints; None where there is no git, or no repository."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
