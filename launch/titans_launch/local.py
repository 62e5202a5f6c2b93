"""Workers on this machine, through torchrun: their output, their signals and their exit code.

Each rank writes to a file of its own (worker.redirect), torchrun to another one. This process follows the file of
rank 0 on the console. Workers report how they ended in a folder, because torchrun exits with 1 whatever their code.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

from hydra.core.hydra_config import HydraConfig

from titans_dist.config import Config
from titans_dist.config.layout import world_size
from titans_launch import names, worker
from titans_launch.processes import Child

GRACE_S = 30.0
"""Seconds the other workers get to end by themselves after one has failed."""


@dataclasses.dataclass(frozen=True)
class Report:
    """How one worker ended, as written by worker.leave."""

    rank: int
    code: int
    text: str
    time: float


def launch(command: str, config: Config) -> int:
    """Run `command` of this configuration in its workers; return the exit code of the one that failed first, or 0."""
    run_dir = Path(config.run_dir)
    world = world_size(config.parallel)
    torchrun_log = run_dir / "logs" / f"{command}-torchrun.log"
    torchrun_log.parent.mkdir(parents=True, exist_ok=True)
    console = worker.log_path(run_dir, command, 0)
    console.touch()
    with tempfile.TemporaryDirectory(prefix="titans-dist-") as reports, console.open("rb") as output:
        output.seek(0, os.SEEK_END)
        environment = os.environ | {
            worker.REPORTS: reports,
            "OMP_NUM_THREADS": str(config.cluster.threads),
            # After a signal torchrun kills its workers within 30 s unless told otherwise; a save may take longer.
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(config.cluster.timeout_s),
        }
        with (
            torchrun_log.open("ab") as log,
            Child(torchrun(world, command, run_dir), env=environment, stdout=log, stderr=log) as child,
        ):
            code = _follow(child, output, Path(reports))
        ends = _read(Path(reports))
        _keep(command, run_dir, ends)
        begun = {int(path.stem) for path in Path(reports).glob("*.begun")}
        return _outcome(run_dir, begun, ends, code, child.signalled)


def torchrun(world: int, command: str, run_dir: Path) -> list[str]:
    """The command line that starts `world` workers with the configuration of the running Hydra job."""
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(world), "--max-restarts", "0"),
        *("-m", "titans_launch", command, *job_arguments(run_dir)),
    ]


def job_arguments(run_dir: Path) -> list[str]:
    """The arguments that compose the configuration of the running Hydra job once more, in the same run folder."""
    job = HydraConfig.get()
    own_folders = [source.path for source in job.runtime.config_sources if source.provider == "command-line"]
    return [
        *(part for folder in own_folders for part in ("--config-dir", folder)),
        *("--config-name", job.job.config_name or "config"),
        *job.overrides.task,
        *(item for item in job.overrides.hydra if "hydra.searchpath" in item),
        f"hydra.run.dir={names.quote(str(run_dir))}",
    ]


def _follow(child: Child, output: BinaryIO, reports: Path) -> int:
    """Copy what rank 0 prints to the console until torchrun ends; its exit code."""
    while True:
        code = child.wait(0.1)
        if text := output.read():
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()
        if code is not None:
            return code
        failure = _first_failure(_read(reports))
        if failure is not None and failure.code != 3 and time.time() - failure.time > GRACE_S:
            child.kill()  # the others wait in a collective for the one that failed


def _read(folder: Path) -> list[Report]:
    return [Report(**json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]


def _first_failure(reports: list[Report]) -> Report | None:
    """The lowest of the ranks that ended with the code that came first."""
    failed = [report for report in reports if report.code]
    if not failed:
        return None
    code = min(failed, key=lambda report: report.time).code
    return min((report for report in failed if report.code == code), key=lambda report: report.rank)


def _keep(command: str, run_dir: Path, reports: list[Report]) -> None:
    """Add what each worker reported to its log."""
    for report in reports:
        if report.text:
            with worker.log_path(run_dir, command, report.rank).open("a") as log:
                log.write(report.text + "\n")


def _outcome(run_dir: Path, begun: set[int], reports: list[Report], code: int, signalled: bool) -> int:
    """Say once what went wrong, and the exit code of the job."""
    if code == 0:
        return 0
    failure = _first_failure(reports)
    # A worker that was killed reports nothing. If the others then say that something broke or that they were asked to
    # stop (by torchrun), this is only the consequence.
    silent = sorted(begun - {report.rank for report in reports})
    if failure is not None and (failure.code not in (1, 3) or not silent):
        print(failure.text, file=sys.stderr, flush=True)
        return failure.code
    if signalled and not begun:
        print("titans-dist: stopped before the workers began, nothing was lost", file=sys.stderr, flush=True)
        return 3
    who = f"rank {', '.join(map(str, silent))}" if silent else "torchrun"
    print(
        f"titans-dist: {who} ended without a word, killed or out of memory; see {run_dir / 'logs'}",
        file=sys.stderr,
        flush=True,
    )
    return 1
