"""What a process is to the job: a worker with a rank, or the command the user typed."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from titans_dist.config import ConfigError

REPORTS = "TITANS_DIST_REPORTS"
"""Environment variable: the folder in which the workers of the local launcher report how they ended."""

_redirected = False


def is_worker() -> bool:
    """Whether torchrun or srun started this process as one of several."""
    return "RANK" in os.environ or (int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ)


def rank() -> int:
    """This worker's global rank."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0"))


def adopt_slurm() -> None:
    """Set torch's variables from srun's, where srun started this process and torchrun did not."""
    if not is_worker() or "RANK" in os.environ:
        return
    if "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            f"srun started {os.environ['SLURM_NTASKS']} tasks but MASTER_ADDR is not set; export the name of the first "
            "node, such as MASTER_ADDR=$(scontrol show hostnames | head -n 1), before srun"
        )
    os.environ.setdefault("MASTER_PORT", "29500")
    for name, source in (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_NTASKS"), ("LOCAL_RANK", "SLURM_LOCALID")):
        os.environ[name] = os.environ[source]


def catch_early_stop() -> None:
    """Let the signals that mean "stop" end this worker with exit code 3 until the training loop handles them itself."""

    def stop(signum: int, frame: FrameType | None) -> None:
        leave(3, "titans-dist: stopped before the first step, nothing was lost; start it again to go on")
        # Not an Exception: Hydra catches those while it composes.
        raise SystemExit(3)

    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(signum, stop)
    if folder := os.environ.get(REPORTS):
        Path(folder, f"{rank()}.begun").touch()


def log_path(run_dir: Path, command: str, rank: int) -> Path:
    """Where the output of one rank goes."""
    return run_dir / "logs" / f"{command}-rank{rank}.log"


def redirect(run_dir: Path, command: str) -> None:
    """Send all output of this worker to its log file; rank 0 keeps the console unless the local launcher follows it."""
    global _redirected
    if rank() == 0 and REPORTS not in os.environ:
        return
    path = log_path(run_dir, command, rank())
    path.parent.mkdir(parents=True, exist_ok=True)
    # At the level of file descriptors, so that what C++ code prints is kept as well.
    with path.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    _redirected = True


def redirected() -> bool:
    """Whether `redirect` gave this process a log file of its own."""
    return _redirected


def leave(code: int, text: str) -> bool:
    """Report the end of this worker to the local launcher; False if there is none."""
    folder = os.environ.get(REPORTS)
    if folder is None or not is_worker():
        return False
    report = {"rank": rank(), "code": code, "text": text, "time": time.time()}
    path = Path(folder, f"{rank()}.json")
    path.with_suffix(".tmp").write_text(json.dumps(report))
    path.with_suffix(".tmp").rename(path)
    return True
