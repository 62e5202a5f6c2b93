"""`titans-dist doctor`: the preflight of a job on all its machines: which of them should be left out?

Whatever happens, it ends: a thread of each process waits for a signal or for the time to be over, and then says who
holds the others up.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from titans_dist.config import Config, UserError
from titans_launch import failures, local, tables, worker

if TYPE_CHECKING:
    from titans_dist.parallel.diagnosis import Diagnosis
    from titans_dist.parallel.machine import Findings
    from titans_dist.parallel.preflight import Preflight

FOLDER = "doctor"
"""In the run folder: what each process has found."""
EXCLUDE = "exclude.txt"
"""In the run folder: the bad hosts, one a line."""
LOOK_S = 0.5
"""Seconds between two looks whether another process has given up."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class BadMachines(UserError):
    """The preflight has found something."""


def run(config: Config) -> int:
    """Examine the machines, as a worker or as the launcher of workers on this machine or node."""
    run_dir = Path(config.run_dir)
    if not worker.is_worker():
        if (node := local.join("doctor", config)) is None or node.rank == 0:
            shutil.rmtree(run_dir / FOLDER, ignore_errors=True)  # what an earlier preflight has found
        return local.launch("doctor", config)
    with contextlib.suppress(OSError):  # a run folder that cannot be written is a finding
        worker.enter(run_dir, "doctor")
    from titans_dist.parallel.preflight import Preflight

    _examine(Preflight(config, run_dir / FOLDER, worker.job() or ""), config, run_dir)
    return 0


def exclude(run_dir: Path, examined: Sequence[str], bad: Sequence[str]) -> Path:
    """Update the list of bad hosts: what was found of those examined counts, others stay as they were."""
    path = run_dir / EXCLUDE
    before = path.read_text().split() if path.exists() else []
    hosts = [*(host for host in before if host not in examined), *bad]
    if not hosts:
        path.unlink(missing_ok=True)
        return path
    new = path.with_suffix(".tmp")
    new.write_text("".join(f"{host}\n" for host in dict.fromkeys(hosts)))
    new.replace(path)
    return path


def show(found: Sequence[Findings], diagnosis: Diagnosis) -> None:
    """Print the worst of each host, and what is wrong with it."""
    table = Table(title="preflight, the worst of each host", title_justify="left")
    table.add_column("host", no_wrap=True, overflow="fold")
    for name in ("processes", "float32", "bfloat16", "run folder", "/dev/shm", "clock", "network"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for host in dict.fromkeys(one.host for one in found):
        own = [one for one in found if one.host == host]
        products = [
            _worst([1e3 * one.products[name].seconds for one in own if name in one.products], "ms", max)
            for name in ("float32", "bfloat16")
        ]
        places = [
            _worst([one.free_bytes[name] / 1e9 for one in own if name in one.free_bytes], "GB free", min)
            for name in ("run folder", "/dev/shm")
        ]
        clock = max((one.clock_s for one in own), key=abs)
        links = [one.link_bytes_per_s / 1e9 for one in own if one.link_bytes_per_s is not None]
        verdict = "BAD" if host in diagnosis.bad else "ok"
        cells = [str(len(own)), *products, *places, f"{1e3 * clock:+.1f} ms", _worst(links, "GB/s", min), verdict]
        table.add_row(host, *cells)
    tables.console().print(table)
    for host, reasons in diagnosis.bad.items():
        tables.console().print(f"BAD {host}: {'; '.join(reasons)}")
    for reason in diagnosis.common:
        tables.console().print(f"WRONG: {reason}")
    if diagnosis.is_good:
        tables.console().print("all is well")


def _worst(values: Sequence[float], unit: str, worst: Callable[[Sequence[float]], float]) -> str:
    return f"{worst(values):.1f} {unit}" if values else "-"


def _examine(preflight: Preflight, config: Config, run_dir: Path) -> None:
    """Raises BadMachines, on all processes, where anything is wrong."""
    from titans_dist.parallel.diagnosis import judge

    guard = _Guard(preflight, config.cluster.timeout_s, run_dir)
    try:
        found = preflight.run()
    except RuntimeError as error:
        guard.end(str(error).splitlines()[0] if str(error) else type(error).__name__)
    guard.disarm()
    diagnosis = judge(found)
    if preflight.rank == 0:
        _tell(found, diagnosis, run_dir)
    preflight.leave()
    if not diagnosis.is_good:
        raise BadMachines(diagnosis.sentence())


def _tell(found: Sequence[Findings], diagnosis: Diagnosis, run_dir: Path) -> None:
    show(found, diagnosis)
    try:
        path = exclude(run_dir, [one.host for one in found], list(diagnosis.bad))
    except OSError as error:
        tables.console().print(f"{EXCLUDE} could not be written: {error}")
    else:
        if diagnosis.bad:
            tables.console().print(f"written to {tables.place(path)}")


class _Guard:
    """Ends a preflight that does not come to its end: after a time, at a signal, or when a process is gone."""

    def __init__(self, preflight: Preflight, timeout_s: float, run_dir: Path) -> None:
        self.preflight, self.timeout_s, self.run_dir = preflight, timeout_s, run_dir
        self._claim = threading.Lock()
        """Held by what ends the preflight; nobody gives it back."""
        self._ear, voice = os.pipe()
        os.set_blocking(voice, False)
        # The main thread may be deep in a collective, where no handler runs; the byte is written all the same.
        for signum in _SIGNALS:
            signal.signal(signum, lambda *_: None)
        signal.set_wakeup_fd(voice)
        threading.Thread(target=self._listen, name="preflight", daemon=True).start()

    def disarm(self) -> None:
        """The preflight has come to its end; one that is ending just now does not return from here."""
        self._claim.acquire()

    def end(self, why: str, *, is_stopped: bool = False) -> None:
        """Say who holds the others up, and end this process."""
        self._claim.acquire()
        from titans_dist.parallel.diagnosis import judge_stuck
        from titans_dist.parallel.preflight import SETTLE_S
        from titans_dist.parallel.watch import end_process

        found = self.preflight.give_up()
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or "1")
        diagnosis = judge_stuck(found, local_world, is_stopped=is_stopped)
        if diagnosis.is_good:
            end_process(failures.say(3, "titans-dist: stopped; nothing was found until then", is_final=True))
        there = [one for one in found if one is not None]
        if not diagnosis.bad:
            diagnosis.common.append(why)
        if self.preflight.rank == min(one.rank for one in there if one.ended):
            _tell(there, diagnosis, self.run_dir)
        else:
            time.sleep(SETTLE_S)  # a launcher may end all processes when the first one has ended
        end_process(failures.say(1, f"titans-dist: {diagnosis.sentence()}"))

    def _listen(self) -> None:
        deadline = time.monotonic() + self.timeout_s
        while time.monotonic() < deadline:
            ready, _, _ = select.select([self._ear], [], [], LOOK_S)
            if ready:
                self.end(f"ended by {signal.Signals(os.read(self._ear, 1)[0]).name}", is_stopped=True)
            if self.preflight.is_over():
                self.end("another process has given up")
        self.end(f"cluster.timeout_s={self.timeout_s} is over")
