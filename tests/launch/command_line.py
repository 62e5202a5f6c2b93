"""How a user calls the command line: a process of its own, with nothing of this test process about it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import titans_data
import titans_dist
import titans_launch

ROOTS = [str(Path(package.__file__).parents[1]) for package in (titans_dist, titans_launch, titans_data)]
STUB = str(Path(__file__).parent / "stub")

Result = subprocess.CompletedProcess[str]
Cli = Callable[..., Result]


def environment(*first: str, **variables: str) -> dict[str, str]:
    """This environment without a trace of other launchers, with the packages (and `first`) importable."""
    foreign = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "HYDRA_FULL_ERROR")
    kept = {
        key: value for key, value in os.environ.items() if key not in foreign and not key.startswith(("SLURM_", "PET_"))
    }
    return kept | {"PYTHONPATH": os.pathsep.join([*first, *ROOTS])} | variables


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "titans_launch", *arguments]


def run(*arguments: str, cwd: Path, first: tuple[str, ...] = (), timeout_s: float = 100, **variables: str) -> Result:
    """Run `titans-dist ARGUMENTS` in `cwd` and wait for it."""
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=environment(*first, **variables),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
