"""What a job has printed, as its logs grow."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from titans_dist.config import UserError

LOOK_S = 0.5
ASK_S = 5.0
"""Seconds between two questions to a scheduler whether a job goes on."""


def follow_file(path: Path, goes_on: Callable[[], bool] | None) -> None:
    """Print a log; where `goes_on` is given, until it says that nothing more will come.

    Raises UserError where there is no such file.
    """
    follow_files([path], goes_on, ask_s=0.0)


def follow_files(paths: Sequence[Path], goes_on: Callable[[], bool] | None, ask_s: float = ASK_S) -> None:
    """The same of several logs; a line says from which one the next lines are, as `tail` does."""
    if not any(path.exists() for path in paths) and (goes_on is None or not goes_on()):
        raise UserError(f"there is no {paths[0]} yet; the job has printed nothing")
    read = dict.fromkeys(paths, 0)
    last: Path | None = None
    asked, is_last = -ask_s, goes_on is None
    while True:
        if goes_on is not None and time.monotonic() - asked >= ask_s:
            is_last, asked = not goes_on(), time.monotonic()
        for path in paths:
            text = _rest(path, read[path])
            if text and len(paths) > 1 and path != last:
                last = path
                sys.stdout.buffer.write(f"==> {path.name} <==\n".encode())
            read[path] += len(text)
            sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()
        if is_last:
            return
        time.sleep(LOOK_S)


def _rest(path: Path, offset: int) -> bytes:
    """What a file holds from `offset` on; nothing where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read()
    except FileNotFoundError:
        return b""
