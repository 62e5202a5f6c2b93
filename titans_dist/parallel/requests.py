"""What a job is asked for from outside: to stop, or to save. Remembered until all ranks have agreed on it.

A stop comes as SIGTERM, SIGINT, SIGUSR1 or SIGUSR2 to any rank, as a file STOP in the run folder, or from a deadline. A
file SAVE asks for a checkpoint, after which training goes on. No rank acts alone: `Asked` is the same on all ranks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from titans_dist.config.variables import STARTED
from titans_dist.parallel.processes import maximum

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
STOP, SAVE = "STOP", "SAVE"
REASONS = ("", *(number.name for number in SIGNALS), "the file STOP", "the deadline")
LOOK_S = 1.0
"""Seconds between two looks at the run folder: it may be on a slow file system."""


@dataclass(frozen=True)
class Asked:
    """What all ranks have agreed on."""

    stop: str
    """Why to stop: one of REASONS, empty for not."""
    save: bool


class Requests:
    """What has been asked of this process so far."""

    def __init__(self, run_dir: Path, max_minutes: float | None, is_main: bool) -> None:
        """`is_main`: whether this rank looks at the files, which all ranks see."""
        self._stop_file, self._save_file, self._is_main = run_dir / STOP, run_dir / SAVE, is_main
        self.deadline = deadline(max_minutes)
        """Unix seconds, or None."""
        self._signal = ""
        self._looked = -LOOK_S
        self._files: tuple[bool, bool] = (False, False)
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name

    def asked(self, needed_s: float, *more: int) -> tuple[Asked, list[int]]:
        """What any rank was asked for, and the largest of each of the numbers `more`. Collective.

        `needed_s`: seconds that a stop takes; the deadline counts as reached when no more are left.
        """
        stop, save = self._signal, False
        if self._is_main:
            is_stop, save = self._look()
            if is_stop and not stop:
                stop = "the file STOP"
        if not stop and self.deadline is not None and time.time() + needed_s >= self.deadline:
            stop = "the deadline"
        reason, is_save, *largest = maximum([REASONS.index(stop), int(save), *more])
        return Asked(REASONS[reason], bool(is_save)), largest

    def obeyed(self, asked: Asked) -> None:
        """Remove the files of what has been done, so that it is not done again."""
        if not self._is_main:
            return
        for is_done, file in ((asked.stop, self._stop_file), (asked.save, self._save_file)):
            if is_done:
                with contextlib.suppress(OSError):
                    file.unlink(missing_ok=True)
        self._files, self._looked = (False, False), -LOOK_S

    def _look(self) -> tuple[bool, bool]:
        if time.monotonic() - self._looked >= LOOK_S:
            self._looked = time.monotonic()
            self._files = (self._stop_file.exists(), self._save_file.exists())
        return self._files


def deadline(max_minutes: float | None) -> float | None:
    """The earlier one of `training.max_minutes` after the start and the end that Slurm has set, in Unix seconds."""
    ends = []
    if max_minutes is not None:
        ends.append(float(os.environ.get(STARTED) or psutil.Process().create_time()) + 60 * max_minutes)
    if end := os.environ.get("SLURM_JOB_END_TIME"):
        ends.append(float(end))
    return min(ends, default=None)
