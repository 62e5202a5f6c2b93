"""What a process is to the job: a worker with a rank, or the command the user typed."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from titans_dist.config import ConfigError, UserError
from titans_launch import attempts, nodes

REPORTS = "TITANS_DIST_REPORTS"
"""Environment variable: the folder in which the workers of the local launcher report how they ended."""

STARTED = time.time()
"""When this process began, as far as this package can tell."""


@dataclasses.dataclass
class _State:
    """What this process has come to know as a worker."""

    run_dir: Path | None = None
    command: str = ""
    console: int | None = None
    """The stderr that it had before its output went to its log."""
    is_final: bool = False
    """Whether it has reported the end of the whole job to the local launcher."""


_state = _State()


class EndedBefore(UserError):
    """The job has already ended in a way that starting the workers again cannot mend."""

    def __init__(self, code: int, sentence: str) -> None:
        super().__init__(sentence)
        self.exit_code = code


def is_worker() -> bool:
    """Whether torchrun or srun started this process as one of several; what srun started may be a node's launcher."""
    if "RANK" in os.environ:
        return True
    return int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ and not nodes.named()


def rank() -> int:
    """This worker's global rank."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0"))


def restart() -> int:
    """How often torchrun has started the workers again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def job() -> str | None:
    """The name that all processes of a job know it by, through all restarts; None under an unknown launcher."""
    start = os.environ.get("SLURM_RESTART_COUNT") or os.environ.get("JOBSET_RESTART_ATTEMPT") or "0"
    node = nodes.this_node()
    if (name := os.environ.get("TORCHELASTIC_RUN_ID") or (node and node.name)) is not None:
        return f"torchrun-{name}-{start}"
    name, step = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID", "0")
    return None if name is None else f"slurm-{name}-{step}-{start}"


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


def begin() -> None:
    """Be a worker: what a crash leaves behind, and signals that mean "stop" until the training loop handles them."""

    def stop(signum: int, frame: FrameType | None) -> None:
        leave(3, "titans-dist: stopped before the first step, nothing was lost; start it again to go on")
        # Not an Exception: Hydra catches those while it composes.
        raise SystemExit(3)

    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, stop)
    # To the file descriptor, which is the log of this worker once it has one. SIGQUIT shows where a hung worker is.
    faulthandler.enable(2)
    faulthandler.register(signal.SIGQUIT, 2)
    if folder := os.environ.get(REPORTS):
        attempts.begin(Path(folder), rank(), restart(), os.getpid())


def log_path(run_dir: Path, command: str, rank: int) -> Path:
    """Where the output of one rank goes."""
    return run_dir / "logs" / f"{command}-rank{rank}.log"


def stacks_path(run_dir: Path, rank: int) -> Path:
    """Where one rank writes what its threads were doing when something went wrong."""
    return run_dir / "logs" / f"stacks-rank{rank}.txt"


def lead(run_dir: Path, command: str) -> None:
    """Take up the work of `command` as the launcher of one node of several."""
    _state.run_dir, _state.command = run_dir, command


def enter(run_dir: Path, command: str) -> None:
    """Take up the work of `command` in this run's folder; all output of this worker goes to its log file.

    Rank 0 keeps the console unless the local launcher follows it. Raises EndedBefore where torchrun has started the
    workers again after an end that a new start cannot mend.
    """
    _state.run_dir, _state.command = run_dir, command
    _heed_predecessor(run_dir)
    if rank() == 0 and REPORTS not in os.environ:
        return
    path = log_path(run_dir, command, rank())
    path.parent.mkdir(parents=True, exist_ok=True)
    _state.console = os.dup(2)
    # At the level of file descriptors, so that what C++ code prints is kept as well.
    with path.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def entered() -> tuple[Path, str] | None:
    """The run folder and the command of `enter`, if it has been called."""
    return None if _state.run_dir is None else (_state.run_dir, _state.command)


def redirected() -> bool:
    """Whether `enter` gave this process a log file of its own."""
    return _state.console is not None


def tell_console(text: str) -> None:
    """Print a line where the person who started the job looks, whatever this worker's output was sent to."""
    os.write(2 if _state.console is None else _state.console, f"{text}\n".encode())


def leave(code: int, text: str, *, is_final: bool = False) -> bool:
    """Report the end of this worker to the local launcher; False if there is none.

    `is_final` says that it is the end of the whole job. torchrun would start the workers again nevertheless: what it
    then starts finds a note in the run's folder, and so do the launchers of other nodes.
    """
    if is_final:
        with contextlib.suppress(OSError):  # a full disk must not hide the error itself
            _leave_note(code, text)
    folder = os.environ.get(REPORTS)
    if folder is None or not is_worker():
        return False
    attempts.report(Path(folder), own_report(code, text, is_final))
    _state.is_final = is_final
    return True


def own_report(code: int, text: str, is_final: bool) -> attempts.Report:
    """How this worker ends."""
    return attempts.Report(rank(), restart(), code, text, is_final, time.time(), socket.gethostname())


def exit_code(code: int) -> int:
    """What this process should exit with, `code` or 0.

    0 once the local launcher knows of the end of the whole job. At any other code torchrun would start the workers
    again, and kill within 30 s those that still save.
    """
    return 0 if _state.is_final else code


def write_stacks(error: BaseException) -> None:
    """Keep an unexpected error, and what all threads of this worker were doing, in the run's folder."""
    if _state.run_dir is None:
        return
    path = stacks_path(_state.run_dir, rank())
    path.parent.mkdir(parents=True, exist_ok=True)
    is_fresh = path.exists() and path.stat().st_mtime >= STARTED
    with path.open("a" if is_fresh else "w") as file:
        file.write("".join(traceback.format_exception(error)) + "\n")
        file.flush()
        faulthandler.dump_traceback(file)


def start(run_dir: Path) -> str:
    """The name of this start of the job, the same for all launchers once it has ended: nodes may have one job name."""
    return f"{job()}-{_read_note(run_dir).get('time')}"


def ended(run_dir: Path) -> tuple[float, int, str] | None:
    """How the job in this folder has ended for good, as its first process to know has said; and when."""
    found = _read_note(run_dir)
    is_ours = found.get("job") == job() and "code" in found
    return (found["time"], found["code"], found["text"]) if is_ours else None


def _note(run_dir: Path) -> Path:
    """What the job in this folder is, and once it has ended for good, how: for workers that torchrun starts again."""
    return run_dir / "logs" / "job.json"


def _leave_note(code: int, text: str) -> None:
    """Tell those whom torchrun may start after this worker how the job has ended."""
    if _state.run_dir is None or job() is None:
        return
    found = _read_note(_state.run_dir)
    if _is_ours(found) and ("code" in found or found["restart"] > restart()):
        return  # the first end counts; one that a newer start has taken the run from does not speak for the job
    _write_note(_state.run_dir, {"code": code, "text": text})


def _heed_predecessor(run_dir: Path) -> None:
    """Raise EndedBefore if the job has ended for good already; else rank 0 notes that this attempt has begun."""
    if job() is None:
        return
    found = _read_note(run_dir)
    is_ours = _is_ours(found)
    if is_ours and "code" in found and found["restart"] < restart():
        raise EndedBefore(found["code"], found["text"].removeprefix("titans-dist: "))
    if rank() == 0 and not (is_ours and "code" in found):
        _write_note(run_dir, {})


def _is_ours(note: dict[str, Any]) -> bool:
    """Whether it is of this job: names may come again."""
    return note.get("job") == job() and (restart() > 0 or note["time"] >= STARTED)


def _write_note(run_dir: Path, end: dict[str, Any]) -> None:
    note = _note(run_dir)
    note.parent.mkdir(parents=True, exist_ok=True)
    new = note.with_name(f"{note.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    new.write_text(json.dumps({"job": job(), "restart": restart(), "time": time.time(), **end}))
    new.replace(note)


def _read_note(run_dir: Path) -> dict[str, Any]:
    try:
        return json.loads(_note(run_dir).read_text())
    except (OSError, ValueError):
        return {}
