"""Evaluation as a job of a real Slurm: one Ray on all of its nodes, for as long as the job."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.slurm.cluster_of_two import SMALL, Cluster, submit
from tests.training.jobs import SINGLE, finish
from titans_dist.evaluation.ledger import Ledger

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]

SUITE = (
    *("suite=offline", "evaluation.tasks=[positions]", "evaluation.lengths=[32,64]", "evaluation.samples=300"),
    *("evaluation.shard=1", "evaluation.workers=2"),
)


def test_workers_on_two_nodes_measure_a_checkpoint(cluster: Cluster, folder: Path) -> None:
    finish(folder, "train", *SMALL, *SINGLE, "training.steps=4", "name=evaluated")
    before = {*psutil.pids()}
    # Slurm gives a task one core unless it is told more: there is room for one worker on each node.
    job = submit(folder, "evaluated", "--command", "evaluate", "cluster.nodes=2", *SINGLE, *SUITE)
    job.wait_until_over()
    assert job.states == ["COMPLETED"], job.log()
    log = job.log()
    assert "step 4: 600 of 600 pieces are to be measured" in log and "600 of 600 pieces" in log
    assert {line.rpartition(" ")[2] for line in log.splitlines() if " is ready on " in line} == {"n1", "n2"}
    assert len(Ledger(job.run.folder / "reports" / "evaluation.sqlite").rows()) == 600
    left = [process.name() for process in psutil.process_iter() if process.pid not in before]
    assert not [name for name in left if name in ("raylet", "gcs_server")]


def test_what_is_wrong_ends_the_job_and_its_ray(cluster: Cluster, folder: Path) -> None:
    finish(folder, "train", *SMALL, *SINGLE, "training.steps=4", "name=wrong")
    job = submit(folder, "wrong", "--command", "evaluate", *SINGLE, *SUITE, "evaluation.step=3")
    job.wait_until_over()
    assert job.states == ["FAILED"]
    assert "step_00000003" in job.log() and "as every further start would" in job.log()
