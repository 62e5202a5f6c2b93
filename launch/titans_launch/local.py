"""Workers on this machine, through torchrun: their output, their signals, their restarts and their exit code.

Each rank writes to a file of its own (worker.enter), torchrun to another one. This process follows the file of rank 0
on the console. Workers report how they ended in a folder, because torchrun exits with 1 whatever their code. It starts
all of them again after one has died; one that reports the end of the whole job exits with 0, so that it does not.

On one node of several (`nodes`) nobody is started again from here, and the end that counts is the job's: what its first
process to know has noted in the run folder (worker.leave).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

from hydra.core.hydra_config import HydraConfig

from titans_dist.config import Config
from titans_dist.config.layout import world_size
from titans_dist.config.variables import STARTED
from titans_launch import attempts, names, nodes, postmortem, verdict, worker
from titans_launch.attempts import Attempt
from titans_launch.nodes import Node
from titans_launch.processes import Child, end_marked, is_running

GRACE_S = 30.0
"""Seconds the other workers get to end by themselves after one has reported the end of the job."""
STACKS_S = 0.5
"""Seconds they then get to write down where they are."""
BARRIER_S = 5.0
"""Seconds after all workers of this node have ended with the job: torchrun would wait minutes for other nodes."""
NOTE_S = 5.0
"""Seconds for which a node whose workers only saw others leave waits for what they say of the end of the job."""
LATE_S = 30.0
"""Seconds by which a node may start after another has ended the job; what was noted before is of an earlier job."""
LOOK_S = 1.0
"""Seconds between two looks at the run folder: it may be on a slow file system."""

LOG_BYTES = 1 << 16
"""Of the end of torchrun's log, in which it tells how workers have failed."""


def launch(command: str, config: Config, *, is_training: bool = False) -> int:
    """Run `command` of this configuration in its workers; return the exit code of the one that failed first, or 0.

    Training is started again, up to cluster.max_restarts times, when a worker has died, and leaves a postmortem when
    it ends abnormally.
    """
    node = join(command, config)
    restarts = config.cluster.max_restarts if is_training and node is None else 0
    job = _Job(command, config, restarts, node)
    started = time.time()
    with tempfile.TemporaryDirectory(prefix="titans-dist-") as reports:
        end = job.run(Path(reports))
    if node is not None and end.code in attempts.FINAL:
        worker.leave(end.code, end.text, is_final=True)  # where it ended before its workers began
    if end.text and not job.is_said_elsewhere:
        _say(end.text)
    if (again := job.comes_back()) is not None and end.code == 1:
        _say(again)
    if is_training and end.code in postmortem.CODES:
        said = postmortem.make(job.run_dir, command, job.attempts, end, job.said, started, node)
        if said is not None:
            _say(said)
    return end.code


def join(command: str, config: Config) -> Node | None:
    """Which node of several this process launches for; from now on it tells the others how the job has ended."""
    node = nodes.this_node()
    if node is not None:
        worker.lead(Path(config.run_dir), command)
    return node


def torchrun(where: list[str], command: str, run_dir: Path) -> list[str]:
    """The command line that starts workers with the configuration of the running Hydra job."""
    start = (sys.executable, "-m", "torch.distributed.run")
    return [*start, *where, "-m", "titans_launch", command, *job_arguments(run_dir)]


def alone(world: int, restarts: int) -> list[str]:
    """The flags of torchrun for `world` workers on this machine."""
    here = ("--standalone", "--local-addr", "127.0.0.1")
    return [*here, "--nproc-per-node", str(world), "--max-restarts", str(restarts)]


def job_arguments(run_dir: Path) -> list[str]:
    """The arguments that compose the configuration of the running Hydra job once more, in the same run folder."""
    return [*job_overrides(), names.place(run_dir)]


def job_overrides() -> list[str]:
    """Those arguments, but for the run folder."""
    job = HydraConfig.get()
    own_folders = [source.path for source in job.runtime.config_sources if source.provider == "command-line"]
    return [
        *(part for folder in own_folders for part in ("--config-dir", folder)),
        *("--config-name", job.job.config_name or "config"),
        *job.overrides.task,
        *(item for item in job.overrides.hydra if "hydra.searchpath" in item),
    ]


class _Job:
    """One torchrun, and what becomes known of its workers while it runs."""

    def __init__(self, command: str, config: Config, restarts: int, node: Node | None) -> None:
        self.command, self.config, self.restarts, self.node = command, config, restarts, node
        self.run_dir = Path(config.run_dir)
        self.is_said_elsewhere = False
        """Whether the launcher of node 0 says how the job has ended, and once is enough."""
        self.attempts: list[Attempt] = []
        self.said: list[str] = []
        """One line for each time the workers were started again."""
        self._places: list[tuple[int | None, int | None, str]] = []
        """Of each attempt that failed: the suspect, the last step, how it ended."""
        self._is_down: bool | None = None
        """Whether no worker could save when the first signal came; None without one."""
        self._log = self.run_dir / "logs" / f"{command}-torchrun{f'-node{node.rank}' if node else ''}.log"
        known = worker.ended(self.run_dir) if node else None
        self._earlier = known if known and known[0] < worker.STARTED - LATE_S else None
        """The end of an earlier job of the same name that is still noted."""
        self._other: verdict.Verdict | None = None
        """How the job of several nodes has ended, from when that is known."""
        self._looked, self._known_at = 0.0, 0.0

    def run(self, reports: Path) -> verdict.Verdict:
        """Start everything, follow it to its end, and say how it ended."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        console = worker.log_path(self.run_dir, self.command, 0)
        console.touch()
        timeout_s = self.config.cluster.timeout_s
        environment = nodes.without_flags(os.environ) | {
            worker.REPORTS: str(reports),
            # A deadline counts from here also for workers that are started again.
            STARTED: os.environ.get(STARTED) or str(worker.STARTED),
            "OMP_NUM_THREADS": str(self.config.cluster.threads),
            # After a signal torchrun kills its workers within 30 s unless told otherwise; a save may take longer.
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(timeout_s),
            # Else workers that are started again may meet at the address of the attempt before.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        with console.open("rb") as output, self._log.open("ab") as log:
            output.seek(0, os.SEEK_END)
            self._log_start = log.tell()
            if self.node is None:
                where = alone(world_size(self.config.parallel), self.restarts)
            else:
                where = self.node.torchrun(self.node.processes(self.config))
            with Child(torchrun(where, self.command, self.run_dir), env=environment, stdout=log, stderr=log) as child:
                code = self._follow(child, output, reports)
            # Where torchrun itself was killed, its workers go on.
            end_marked(worker.REPORTS, str(reports), "titans_launch", timeout_s)
        self._read(reports)
        # Between two attempts somebody stopped the job; a node that fails is told to stop by what watches all of them.
        is_between = self._is_down is True and not child.is_killed and self.node is None
        is_stopped = child.signalled and (not self.attempts or is_between)
        end = verdict.judge(self.attempts, code, self.run_dir, self.command, is_stopped=is_stopped)
        if self.attempts:
            self._close(self.attempts[-1])
        return end if self.node is None else self._of_all(end, self.node)

    def _of_all(self, own: verdict.Verdict, node: Node) -> verdict.Verdict:
        """The end of the whole job: what was noted of it, where this node did not end well; else its own."""
        deadline = time.monotonic() + NOTE_S
        while own.code == 1 and not self._look() and time.monotonic() < deadline:
            time.sleep(0.1)
        if own.code == 0 or not self._look():
            return own
        assert self._other is not None
        self.is_said_elsewhere = node.rank > 0
        return verdict.Verdict(self._other.code, self._other.text or own.text, own.suspect)

    def _look(self) -> bool:
        """Whether the end of the job is known to this node."""
        if self._other is None and (found := worker.ended(self.run_dir)) not in (None, self._earlier):
            assert found is not None
            self._other, self._known_at = verdict.Verdict(found[1], found[2]), time.time()
        return self._other is not None

    def comes_back(self) -> str | None:
        """A sentence, if every attempt ended at the same place in the same way."""
        if len(self._places) < 2 or len(set(self._places)) > 1:
            return None
        _, step, _ = self._places[0]
        where = "before the first step" if step is None else f"after step {step}"
        return (
            f"titans-dist: all {len(self._places)} attempts ended like this {where}; starting again will not help "
            "until the cause is mended"
        )

    def _follow(self, child: Child, output: BinaryIO, reports: Path) -> int:
        """Copy what rank 0 prints to the console until torchrun ends; its exit code."""
        while True:
            code = child.wait(0.1)
            self._read(reports)
            if child.signalled and self._is_down is None:
                self._is_down = not self.attempts or self._has_failed(self.attempts[-1])
            if (text := output.read()) and (self.node is None or self.node.rank == 0):
                sys.stdout.buffer.write(text)
                sys.stdout.buffer.flush()
            if code is not None:
                return code
            if self._is_overdue():
                self._show_stacks()
                child.kill()  # the others wait in a collective for the one that ended

    def _is_overdue(self) -> bool:
        """Whether the job has ended, and what still runs of it here had its time."""
        last = self.attempts[-1] if self.attempts else Attempt(0)
        final, now = last.final(), time.time()
        if self.node is None:
            return final is not None and now - final.time > GRACE_S
        if now - self._looked > LOOK_S:
            self._looked = now
            self._look()
        are_done = len(last.reports) == self.node.processes(self.config) and final is not None
        if are_done and now - max(report.time for report in last.reports.values()) > BARRIER_S:
            return True
        known_at = final.time if final is not None else self._known_at
        return known_at > 0 and now - known_at > (GRACE_S if last.begun else 0)

    def _read(self, reports: Path) -> None:
        """Find out what the workers have told; announce that they were started again."""
        with self._log.open("rb") as log:
            log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - LOG_BYTES))
            found = attempts.read(reports, log.read().decode(errors="replace"))
        known, self.attempts = len(self.attempts), found
        for before, after in zip(found[max(known - 1, 0) :], found[max(known, 1) :], strict=False):
            self._close(before)
            if before.final() is None:  # else those that are started again only say so once more
                self._announce(before, self.restarts - after.restart)

    def _has_failed(self, attempt: Attempt) -> bool:
        """Whether a worker of a running attempt has died or failed."""
        return attempt.failure() is not None or not all(is_running(attempt.begun[rank]) for rank in attempt.silent)

    def _announce(self, failed: Attempt, left: int) -> None:
        whom = verdict.suspect(failed, self.run_dir, self.command)
        who = f"{whom.place} {whom.why}" if whom else "a worker ended without a trace"
        line = (
            f"{who}; starting all again from the newest checkpoint, "
            f"{left} of {self.restarts} restart{'s' * (self.restarts != 1)} left"
        )
        self.said.append(line)
        _say(f"titans-dist: {line}")

    def _close(self, attempt: Attempt) -> None:
        """Note where an attempt ended, and add what each worker reported to its log."""
        from titans_dist.run.postmortem import last_step

        whom = verdict.suspect(attempt, self.run_dir, self.command)
        if whom is not None:
            self._places.append((whom.rank, last_step(self.run_dir), whom.why))
        for report in attempt.reports.values():
            if report.text:
                with worker.log_path(self.run_dir, self.command, report.rank).open("a") as log:
                    log.write(report.text + "\n")

    def _show_stacks(self) -> None:
        """Let the workers that still run write to their logs what their threads are doing."""
        last = self.attempts[-1] if self.attempts else Attempt(0)
        for rank in last.silent:
            with contextlib.suppress(ProcessLookupError):
                os.kill(last.begun[rank], signal.SIGQUIT)
        time.sleep(STACKS_S)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
