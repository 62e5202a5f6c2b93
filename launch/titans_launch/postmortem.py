"""The postmortem of a job that ended abnormally: who ended how, who is suspected, and the folder that holds it all.

The local launcher makes it for all its workers; those of several nodes make one together, each its part. Under another
launcher each worker that fails adds its own part.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from titans_launch import worker
from titans_launch.attempts import Attempt, Report, how
from titans_launch.nodes import Node
from titans_launch.verdict import Suspect, Verdict, blamed, last_line, suspect

CODES = (1, 4, 5)
"""Exit codes of an abnormal end."""


def make(
    run_dir: Path,
    command: str,
    attempts: Sequence[Attempt],
    verdict: Verdict,
    restarts: Sequence[str],
    since: float,
    node: Node | None = None,
) -> str | None:
    """Make the folder for a job of this machine, or this node's part of it; one sentence that names it.

    None where another node says it. It never raises.
    """
    try:
        return _make(run_dir, command, attempts, verdict, restarts, since, node)
    except Exception as error:  # the job's own end is what counts
        return f"titans-dist: no postmortem could be written: {type(error).__name__}: {error}"


def add_own(code: int, text: str, is_final: bool) -> None:
    """Add the end of this worker to the folder of its job, where no local launcher will; it never raises."""
    is_alone = worker.is_worker() and worker.entered() is not None and worker.REPORTS not in os.environ
    if not is_alone or code not in CODES or worker.job() is None:
        return
    try:
        sentence = _add_own(worker.own_report(code, text, is_final))
    except Exception as error:  # as above
        print(f"titans-dist: no postmortem could be written: {type(error).__name__}: {error}", file=sys.stderr)
        return
    if sentence is not None:
        worker.tell_console(sentence)


def _make(
    run_dir: Path,
    command: str,
    attempts: Sequence[Attempt],
    verdict: Verdict,
    restarts: Sequence[str],
    since: float,
    node: Node | None,
) -> str | None:
    from titans_dist.run import postmortem

    bundle, is_first = postmortem.open_bundle(run_dir, claim=worker.start(run_dir) if node else None)
    last = attempts[-1] if attempts else Attempt(0)
    for rank in sorted({*last.begun, *last.reports}):
        report = last.reports.get(rank)
        postmortem.add_rank(bundle, run_dir, command, rank, since)
        postmortem.add_report(bundle, rank, _facts(report) if report else _silent(last, rank))
    if node is None:
        return _finish(bundle, run_dir, command, verdict.text, verdict.suspect, restarts)
    whom = _suspect_of_all(bundle, run_dir, command) or verdict.suspect
    sentence = _finish(bundle, run_dir, command, verdict.text, whom, restarts, with_common=is_first)
    return sentence if node.rank == 0 or is_first else None


def _suspect_of_all(bundle: Path, run_dir: Path, command: str) -> Suspect | None:
    """Whom the job failed by, from all that has been added so far."""
    from titans_dist.run import postmortem

    added = postmortem.reports(bundle)
    names = [field.name for field in dataclasses.fields(Report)]
    found = [Report(**{name: facts[name] for name in names}) for facts in added if "is_dead" not in facts]
    attempt = Attempt(0, reports={one.rank: one for one in found})
    dead = [Suspect(facts["rank"], facts["host"], facts["text"]) for facts in added if facts.get("is_dead")]
    return dead[0] if dead and attempt.final() is None else suspect(attempt, run_dir, command)


def _add_own(report: Report) -> str | None:
    """The sentence, if this worker was the first to fail."""
    from titans_dist.run import postmortem

    entered = worker.entered()
    assert entered is not None
    run_dir, command = entered
    bundle, is_first = postmortem.open_bundle(run_dir, claim=f"{worker.job()}-{report.restart}")
    postmortem.add_rank(bundle, run_dir, command, report.rank, worker.STARTED)
    postmortem.add_report(bundle, report.rank, _facts(report))
    found = [Report(**facts) for facts in postmortem.reports(bundle)]
    attempt = Attempt(report.restart, reports={one.rank: one for one in found})
    failure = attempt.final() or attempt.failure() or report
    whom = suspect(attempt, run_dir, command) or blamed(failure, found)
    sentence = _finish(bundle, run_dir, command, failure.text, whom, [], with_common=is_first)
    return sentence if is_first else None


def _finish(
    bundle: Path,
    run_dir: Path,
    command: str,
    text: str,
    whom: Suspect | None,
    restarts: Sequence[str],
    *,
    with_common: bool = True,
) -> str:
    """What is said once all parts are there that can be; the sentence for the console."""
    from titans_dist.run import postmortem
    from titans_launch import tables
    from titans_launch.info import PACKAGES, version

    if with_common:
        postmortem.add_common(bundle, run_dir, command, {name: version(name) for name in PACKAGES})
    ranks = postmortem.reports(bundle)
    step = postmortem.last_step(run_dir)
    facts = {
        "sentence": text,
        "suspect": dataclasses.asdict(whom) if whom else None,
        "last_step": step,
        "exit_codes": {str(report["rank"]): report["code"] for report in ranks},
        "ranks": ranks,
        "restarts": list(restarts),
    }
    postmortem.add_summary(bundle, _readme(bundle, run_dir, text, whom, ranks, restarts, step), facts)
    who = f"{whom.place} {whom.why}" if whom else "no rank is suspected"
    return f"titans-dist: postmortem in {tables.place(bundle)}; {who}"


def _readme(
    bundle: Path,
    run_dir: Path,
    text: str,
    whom: Suspect | None,
    ranks: Sequence[dict[str, Any]],
    restarts: Sequence[str],
    step: int | None,
) -> str:
    host = max((len(report["host"]) for report in ranks), default=4)
    lines = [
        f"Postmortem of {run_dir.name}, {bundle.name}",
        "",
        f"Last step:  {'none' if step is None else step}",
        f"Suspect:    {f'{whom.place} {whom.why}' if whom else 'no rank in particular'}",
        "",
        f"rank  {'host':<{host}}  exit code  last words",
        *(
            f"{report['rank']:>4}  {report['host']:<{host}}  {'-' if report['code'] is None else report['code']:>9}  "
            f"{last_line(report['text']) if report['text'] else ''}"
            for report in ranks
        ),
        "",
        *(("Started again:", *(f"  {line}" for line in restarts), "") if restarts else ()),
        "What was said:",
        *(f"  {line}" for line in (text or "nothing").splitlines()),
        "",
        "A rank that is missing here has not said how it ended. logs/ has the last lines of each rank's log,",
        "stacks-rank*.txt what its threads were doing, flight-rank*.json its last collectives.",
    ]
    return "\n".join(lines) + "\n"


def _facts(report: Report) -> dict[str, Any]:
    return dataclasses.asdict(report)


def _silent(attempt: Attempt, rank: int) -> dict[str, Any]:
    """The facts of a rank without a report."""
    status = attempt.status(rank)
    is_dead = rank in attempt.dead()
    return {
        "rank": rank,
        "restart": attempt.restart,
        "code": status,
        "text": f"ended without a word ({how(status)})" if is_dead else "had to be ended",
        "host": socket.gethostname(),
        "is_dead": is_dead,
    }
