"""Faults that a drill asks for, at exact steps of the real loop. Without TITANS_DIST_FAULTS there are none.

The variable names a JSON file: a list of faults, each with `id`, `kind`, `step`, `rank` (null: all),
`seconds` and `steps`. A fault comes
once, also when its step is done again after a restart: what has come leaves a file beside the list.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from titans_dist.config.variables import FAULTS

FULL_DISK_BYTES = 4096
"""With a full disk no file gets larger than this."""


class Faults:
    """This rank's part of a list of faults."""

    def __init__(self) -> None:
        self._path = Path(os.environ[FAULTS]) if FAULTS in os.environ else None
        faults = [] if self._path is None else json.loads(self._path.read_text())
        self._faults = [fault for fault in faults if fault["rank"] in (dist.get_rank(), None)]
        self._full_until = math.inf

    def before_step(self, step: int, engine: Any) -> None:
        """Do what is to happen in this step."""
        if step > self._full_until:
            _limit_files(None)
            self._full_until = math.inf
        for fault in self._faults:
            if fault["step"] == step and self._is_first(fault):
                self._inject(fault, engine)

    def _is_first(self, fault: dict[str, Any]) -> bool:
        assert self._path is not None
        try:
            self._path.with_name(f"fault-{fault['id']}-rank{dist.get_rank()}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _inject(self, fault: dict[str, Any], engine: Any) -> None:
        kind, seconds = fault["kind"], fault["seconds"]
        if kind == "kill":
            _later(seconds, signal.SIGKILL)
        elif kind == "terminate":
            _later(seconds, signal.SIGTERM)
        elif kind == "full disk":
            _limit_files(FULL_DISK_BYTES)
            self._full_until = fault["step"] + fault["steps"] - 1
        elif kind == "nan":
            _spoil_one_gradient(engine)
        elif kind == "slow":
            time.sleep(seconds)
        elif kind == "hang":
            while True:
                time.sleep(60)


def _later(seconds: float, number: signal.Signals) -> None:
    """Somewhere inside the step, or what follows it."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


def _limit_files(size_bytes: int | None) -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size_bytes is None else size_bytes, hard))


def _spoil_one_gradient(engine: Any) -> None:
    """The next gradient of this rank's first matrix is not a number; the one after it is sound again."""
    matrix = next(value for value in engine.stages[0].model.parameters() if value.dim() > 1)

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        handle.remove()
        return gradient * math.nan

    handle = matrix.register_hook(spoil)
