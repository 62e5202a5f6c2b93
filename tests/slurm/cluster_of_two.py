"""A real cluster (`cluster`, beside this file), and jobs that `titans-dist submit` hands to it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.launch import command_line
from tests.training.jobs import SIZES, Run
from titans_launch.schedulers.job import Submission, remembered
from titans_launch.schedulers.slurm import Slurm

TIMEOUT_S = 240.0
STEPS = 24
RANKS_4 = ("cluster.nodes=2", "parallel.tensor=1", "parallel.data=4")
RANKS_2 = ("cluster.nodes=2", "parallel.tensor=1", "parallel.data=2")
SMALL = (
    *SIZES,
    "training.micro_batch_size=2",
    "cluster=slurm",
    "data=synthetic",
    "data.vocab_size=320",
    f"training.steps={STEPS}",
    "cluster.timeout_s=60",
)
"""The quickstart's model and data, small."""


class Cluster:
    """Two nodes, n1 and n2."""

    def __init__(self, state: Path) -> None:
        self.conf = str(state / "slurm.conf")
        # Others may test on this machine at the same time.
        self._environment = os.environ | {"SLURM_CLUSTER_DIR": str(state), "SLURM_CLUSTER_ID": str(os.getpid() % 100)}

    def do(self, *words: str) -> str:
        """Run the script `cluster` with these words."""
        script = Path(__file__).with_name("cluster")
        done = subprocess.run(
            [script, *words], env=self._environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=True
        )
        return done.stdout

    def start(self) -> None:
        self.do("start", "2")

    def stop(self) -> None:
        self.do("stop")

    def reset(self) -> None:
        self.do("reset")


def slurm(*words: str) -> str:
    """What one of Slurm's own commands prints."""
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout


class Submitted:
    """A job of one run that was handed in."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self.run = name, Run(folder / "runs" / name)
        submission = remembered(self.run.folder)
        assert submission is not None
        self.submission: Submission = submission

    @property
    def id(self) -> str:
        """Slurm's number of the first job."""
        return self.submission.ids[0]

    @property
    def states(self) -> list[str]:
        """Slurm's words."""
        return [state.state for state in Slurm().states(self.submission)]

    @property
    def restarts(self) -> int:
        """How often Slurm has requeued the job."""
        return int(re.search(r"Restarts=(\d+)", slurm("scontrol", "show", "job", self.id))[1])  # type: ignore[index]

    def log(self) -> str:
        """Everything it has printed."""
        logs = sorted((self.run.folder / "logs").glob("*.out"))
        return "".join(f"==> {path.name}\n{path.read_text()}" for path in logs)

    def wait(self, what: str, condition: Callable[[], bool]) -> None:
        """Poll until `condition` holds; a requeued job does not wait for the rest of Slurm's delay."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            story = f"{self.states}\n{self.log()}"
            assert time.monotonic() < deadline, f"waited {TIMEOUT_S:g} s for {what}\n{story}"
            if "PENDING" in self.states and self.restarts:
                # Nodes refuse a start in the second in which the one before has ended; Slurm itself waits longer.
                time.sleep(1.2)
                subprocess.run(["scontrol", "update", f"JobId={self.id}", "StartTime=now"], capture_output=True)
            time.sleep(0.3)

    def wait_for_training(self, start: int = 1, steps: int = 2) -> None:
        """Wait until a start, the first of this run or a later one, has done so many steps."""

        def trains() -> bool:
            resumes = len(self.run.events("resume"))
            return resumes == start - 1 and len(self.run.after_resume() if resumes else self.run.steps) >= steps

        self.wait(f"{steps} steps of start {start}", trains)

    def finish(self) -> None:
        """Wait until every job is over; the run is done."""
        self.wait_until_over()
        assert set(self.states) == {"COMPLETED"} and self.run.status == "done", f"{self.states}\n{self.log()}"

    def wait_until_over(self) -> None:
        self.wait("the end", lambda: all(state.is_over for state in Slurm().states(self.submission)))


def call(folder: Path, *arguments: str) -> command_line.Result:
    """`titans-dist ARGUMENTS` as a user calls it, who has a cluster."""
    return command_line.run(*arguments, cwd=folder, SLURM_CONF=os.environ["SLURM_CONF"])


def submit(folder: Path, name: str, *arguments: str) -> Submitted:
    """Hand in a run of the small model, which must be accepted."""
    done = call(folder, "submit", *SMALL, *arguments, f"name={name}")
    assert done.returncode == 0, done.stdout + done.stderr
    return Submitted(folder, name)


def slowly(folder: Path, seconds: float = 0.7) -> str:
    """The override with which all ranks wait before each step but the first, so that there is time to do something."""
    return faults(
        folder, *({"kind": "slow", "step": step, "rank": None, "seconds": seconds} for step in range(2, STEPS))
    )


def faults(folder: Path, *each: dict[str, Any]) -> str:
    """The override with which the ranks meet these faults (titans_dist.training.faults)."""
    (folder / "faults").mkdir()
    listed = [{"id": number, "seconds": 0.0, "steps": 1, **fault} for number, fault in enumerate(each)]
    (folder / "faults" / "faults.json").write_text(json.dumps(listed))
    return f"+cluster.environment.TITANS_DIST_FAULTS={folder}/faults/faults.json"


def no_more_faults(folder: Path) -> None:
    """What is started from now on meets none."""
    (folder / "faults" / "faults.json").write_text("[]")
