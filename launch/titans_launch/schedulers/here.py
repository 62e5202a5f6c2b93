"""This machine as a scheduler: the job goes on in the background when the shell that started it is closed."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from titans_dist.config import UserError
from titans_launch.processes import is_running
from titans_launch.schedulers import snapshot
from titans_launch.schedulers.job import Job, State, Submission
from titans_launch.schedulers.show import follow_file

LOG = "submit.log"
STOP_TIMEOUT_S = 900.0
"""Seconds that a job gets to save before it is told to be too slow."""


class Here:
    """One process in a session of its own; its id is PID@STARTED, because numbers of processes come again."""

    def render(self, job: Job) -> dict[str, str]:
        environment = dict(job.config.cluster.environment)
        if job.code is not None:
            environment["PYTHONPATH"] = snapshot.python_path(job.code)
        words = [sys.executable, "-m", "titans_launch", *job.words(job.run_dir)]
        lines = [
            "#!/bin/sh",
            f"# {job.name}: written by titans-dist submit",
            f"cd {shlex.quote(str(job.folder))} || exit 2",
            *(f"export {name}={shlex.quote(value)}" for name, value in environment.items()),
            f"exec {shlex.join(words)}",
        ]
        return {"job.sh": "\n".join(lines) + "\n"}

    def check(self, job: Job) -> None:
        pass

    def submit(self, job: Job, files: list[Path]) -> list[str]:
        return [self._start(files[0], job.run_dir)]

    def states(self, submission: Submission) -> list[State]:
        (name,) = submission.ids
        is_over = self._process(submission) is None
        return [State(name.partition("@")[0], "ENDED" if is_over else "RUNNING", is_over, "process of this machine")]

    def logs(self, submission: Submission, follow: bool) -> None:
        log = Path(submission.run_dir) / "logs" / LOG
        follow_file(log, (lambda: self._process(submission) is not None) if follow else None)

    def cancel(self, submission: Submission) -> None:
        process = self._process(submission)
        if process is None:
            raise UserError(f"{submission.name} does not run any more, so there is nothing to cancel")
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while is_running(process.pid):
            if time.monotonic() > deadline:
                raise UserError(f"process {process.pid} has not ended {STOP_TIMEOUT_S:.0f} s after SIGTERM; kill it")
            time.sleep(0.1)

    def requeue(self, submission: Submission) -> None:
        self.cancel(submission)
        run_dir = Path(submission.run_dir)
        submission.ids[:] = [self._start(run_dir / "submit" / submission.files[0], run_dir)]

    def _start(self, script: Path, run_dir: Path) -> str:
        log = run_dir / "logs" / LOG
        log.parent.mkdir(parents=True, exist_ok=True)
        clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        with log.open("ab") as output:
            child = subprocess.Popen(
                ["/bin/sh", str(script)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=clean,
            )
        return f"{child.pid}@{psutil.Process(child.pid).create_time()}"

    def _process(self, submission: Submission) -> psutil.Process | None:
        """The process, if it still is the one that was started and has not ended."""
        pid, _, started = submission.ids[0].partition("@")
        try:
            process = psutil.Process(int(pid))
            is_ours = process.create_time() == float(started) and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return None
        return process if is_ours else None


def scheduler(backend: str) -> Here:
    """The only one there is."""
    return Here()
