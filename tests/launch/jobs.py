"""A job of the launcher whose training loop is the stand-in of stub/, and what it leaves."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.launch.command_line import STUB, Result, command, environment
from titans_dist.tracking import read_metrics

TRAIN = ["train", "data=synthetic", "name=run", "training.log_interval=10"]
ONCE = ["cluster.max_restarts=0"]


def logs(folder: Path) -> dict[str, str]:
    """Name -> text of the logs of the run in `folder`."""
    return {path.name: path.read_text() for path in (folder / "runs" / "run" / "logs").glob("*.log")}


class Job:
    """A `titans-dist train` that goes on until it is stopped."""

    def __init__(self, folder: Path, *arguments: str, **variables: str) -> None:
        self.run_dir = folder / "runs" / "run"
        self.process = subprocess.Popen(
            command(*TRAIN, "training.steps=100000", *arguments),
            cwd=folder,
            env=environment(STUB, **variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for_steps(self, steps: int) -> None:
        metrics = self.run_dir / "metrics.jsonl"
        self.wait_until(lambda: metrics.exists() and len(read_metrics(metrics)) >= steps)

    def wait_until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def torchrun(self) -> psutil.Process:
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


def foreign_torchrun(folder: Path, *arguments: str, restarts: int = 0, **variables: str) -> Result:
    """The same job under a torchrun that somebody else has started."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*torchrun, "--max-restarts", str(restarts), *command(*TRAIN, *arguments)[1:]],
        cwd=folder,
        env=environment(STUB, **variables),
        capture_output=True,
        text=True,
        timeout=100,
    )


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that do not end within some seconds."""
    _, left = psutil.wait_procs(processes, timeout=5)
    return left
