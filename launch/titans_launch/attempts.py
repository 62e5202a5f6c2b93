"""What the workers tell the launcher of their machine: that they have begun, and how they ended.

torchrun starts all workers again after one has died. Each of these starts is an attempt, with reports of its own.
"""

from __future__ import annotations

import dataclasses
import json
import re
import signal
from pathlib import Path

FINAL = (2, 3, 4, 5)
"""Exit codes after which the same start would end the same way, or must not come: nobody starts again by himself."""

_TORCHRUN_SAYS = re.compile(r"exitcode: (-?\d+)\) local_rank: \d+ \(pid: (\d+)\)")


@dataclasses.dataclass(frozen=True)
class Report:
    """How one worker ended, in its own words."""

    rank: int
    restart: int
    """Which attempt it was of, from 0."""
    code: int
    text: str
    """What it said; empty where all is well."""
    is_final: bool
    """Whether its code speaks for the whole job, which is then not started again."""
    time: float
    host: str


@dataclasses.dataclass
class Attempt:
    """What is known of one start of the workers."""

    restart: int
    begun: dict[int, int] = dataclasses.field(default_factory=dict)
    """Rank -> process id of the workers that have begun."""
    reports: dict[int, Report] = dataclasses.field(default_factory=dict)
    """Those of the workers that have ended, by rank; one that was killed has none."""
    first: tuple[int, int] | None = None
    """Rank and exit status (negative: a signal) of the worker that torchrun saw fail first."""

    @property
    def silent(self) -> list[int]:
        """The ranks that have begun and not reported: they run, or were killed."""
        return sorted(set(self.begun) - set(self.reports))

    def final(self) -> Report | None:
        """The report that decides the job: of the code that came first, the lowest rank's."""
        return _earliest([report for report in self.reports.values() if report.is_final])

    def failure(self) -> Report | None:
        """The first report of something that went wrong, stops on request aside."""
        if self.first is not None and (report := self.reports.get(self.first[0])) and report.code not in (0, 3):
            return report
        return _earliest([report for report in self.reports.values() if report.code not in (0, 3)])

    def stopped(self) -> Report | None:
        """A report of a stop on request."""
        return _earliest([report for report in self.reports.values() if report.code == 3])

    def dead(self) -> list[int]:
        """The silent ranks, unless torchrun only ended them after another one had failed."""
        if self.first is not None and self.first[0] in self.reports:
            return []
        return [self.first[0]] if self.first is not None else self.silent

    def status(self, rank: int) -> int | None:
        """The exit status of a silent rank, where torchrun has told it."""
        return self.first[1] if self.first is not None and self.first[0] == rank else None


def begin(folder: Path, rank: int, restart: int, pid: int) -> None:
    """Say that a worker has begun."""
    _write(folder / f"{restart}-{rank}.begun", str(pid))


def report(folder: Path, report: Report) -> None:
    """Say how a worker has ended."""
    _write(folder / f"{report.restart}-{report.rank}.json", json.dumps(dataclasses.asdict(report)))


def read(folder: Path, torchrun_says: str = "") -> list[Attempt]:
    """All attempts of which a worker has begun or ended, in order; `torchrun_says` is what torchrun has logged."""
    attempts: dict[int, Attempt] = {}
    for path in sorted(folder.glob("*.begun")):
        restart, rank = map(int, path.stem.split("-"))
        attempts.setdefault(restart, Attempt(restart)).begun[rank] = int(path.read_text())
    for path in sorted(folder.glob("*.json")):
        one = Report(**json.loads(path.read_text()))
        attempts.setdefault(one.restart, Attempt(one.restart)).reports[one.rank] = one
    statuses = {int(pid): int(status) for status, pid in _TORCHRUN_SAYS.findall(torchrun_says)}
    for attempt in attempts.values():
        known = [(rank, statuses[pid]) for rank, pid in attempt.begun.items() if pid in statuses]
        attempt.first = known[0] if known else None
    return [attempts[restart] for restart in sorted(attempts)]


def how(status: int | None) -> str:
    """Words for the exit status of a worker that has said nothing."""
    if status is None:
        return "killed or out of memory"
    if status >= 0:
        return f"exit code {status}"
    name = signal.Signals(-status).name
    return f"{name}: killed, or out of memory" if name == "SIGKILL" else name


def _earliest(reports: list[Report]) -> Report | None:
    """The lowest rank's of the code that came first."""
    if not reports:
        return None
    code = min(reports, key=lambda report: report.time).code
    return min((report for report in reports if report.code == code), key=lambda report: report.rank)


def _write(path: Path, text: str) -> None:
    new = path.with_suffix(".tmp")
    new.write_text(text)
    new.rename(path)
