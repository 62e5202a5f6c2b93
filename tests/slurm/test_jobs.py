"""Training under a real Slurm: whatever ends a start, the run goes on, with the losses of an unbroken one."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster_of_two import (
    RANKS_2,
    RANKS_4,
    SMALL,
    STEPS,
    Cluster,
    call,
    faults,
    no_more_faults,
    slowly,
    slurm,
    submit,
)
from tests.training.jobs import INTERVAL, Run, finish

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]

Losses = Callable[[int], dict[int, float]]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """unbroken(2) are the losses of the run on two ranks of this machine, without Slurm."""

    @functools.cache
    def trained(ranks: int) -> dict[int, float]:
        folder = tmp_path_factory.mktemp("unbroken")
        layout = {2: RANKS_2, 4: RANKS_4}[ranks]
        finish(folder, "train", *SMALL, *layout, "name=unbroken", world=ranks)
        return Run(folder / "runs" / "unbroken").losses

    return trained


def test_at_its_time_limit_a_run_is_saved_requeued_and_goes_on(
    cluster: Cluster, folder: Path, unbroken: Losses
) -> None:
    job = submit(folder, "limited", *RANKS_4, slowly(folder, 2), "cluster.grace_s=10")
    job.wait_for_training()
    slurm("scontrol", "update", f"JobId={job.id}", "EndTime=now+50")  # Slurm looks at limits every half a minute
    job.wait("its requeue", lambda: job.restarts == 1)
    no_more_faults(folder)
    job.finish()
    assert job.restarts == 1
    assert re.search(r"stopped by the file STOP after step \d+, which is saved", job.log())
    assert sorted(job.run.steps) == [*range(1, STEPS + 1)]  # no step was done again
    assert job.run.losses == unbroken(4)
    log = (job.run.folder / "logs" / f"limited-{job.id}.out").read_text()
    assert "limited: start 1 as job" in log and "limited: start 2 as job" in log  # the second one appends


def test_requeued_by_its_user_by_an_administrator_and_by_a_more_urgent_job(
    cluster: Cluster, folder: Path, unbroken: Losses
) -> None:
    job = submit(folder, "often", *RANKS_2, slowly(folder))
    job.wait_for_training()
    assert call(folder, "requeue", "often").returncode == 0
    job.wait_for_training(start=2)
    slurm("scontrol", "requeue", job.id)
    job.wait_for_training(start=3)
    no_more_faults(folder)
    urgent = slurm("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap", "sleep 1")
    job.finish()
    assert "JobState=COMPLETED" in slurm("scontrol", "show", "job", urgent.strip())
    assert job.restarts == 3
    assert sorted(job.run.steps) == [*range(1, STEPS + 1)]
    assert job.run.losses == unbroken(2)


# The power of the first node fails, where the script runs; the other one's slurmd dies, and its processes live on.
@pytest.mark.parametrize("how", ["fail-node n1", "kill-slurmd n2"])
def test_after_the_loss_of_a_node_the_run_waits_for_it_and_goes_on_from_the_newest_checkpoint(
    cluster: Cluster, folder: Path, unbroken: Losses, how: str
) -> None:
    job = submit(folder, "lost", *RANKS_2, slowly(folder, 2))
    job.wait_for_training(steps=INTERVAL + 1)
    cluster.do(*how.split())
    job.wait("waiting for the node", lambda: job.states == ["PENDING"])
    no_more_faults(folder)
    cluster.do("start-node", how.split()[1])
    job.finish()
    assert job.restarts == 1
    assert job.run.losses == unbroken(2)


def test_after_the_death_of_a_process_all_start_again_in_the_same_allocation(
    cluster: Cluster, folder: Path, unbroken: Losses
) -> None:
    job = submit(folder, "killed", *RANKS_2, faults(folder, {"kind": "kill", "step": 7, "rank": 1}))
    job.finish()
    assert job.restarts == 0
    assert "starting all processes again, restart 1 of 3" in job.log()
    assert job.run.losses == unbroken(2)


def test_a_configuration_error_is_not_tried_again(cluster: Cluster, folder: Path) -> None:
    job = submit(folder, "wrong", *RANKS_2, "cluster.slurm.setup=['words+=(training.steps=many)']")
    job.wait_until_over()
    assert job.states == ["FAILED"] and job.restarts == 0
    assert job.log().count("training.steps=many is not a whole number") == 1  # in one attempt, and one rank says it
    assert "ends with 2, as every further start would" in job.log()


def test_canceled_a_run_is_saved_and_the_same_submission_goes_on(
    cluster: Cluster, folder: Path, unbroken: Losses
) -> None:
    overrides = (*RANKS_2, slowly(folder))
    job = submit(folder, "canceled", *overrides)
    job.wait_for_training()
    no_more_faults(folder)
    assert call(folder, "cancel", "canceled").returncode == 0
    assert job.states == ["FAILED"] and job.run.status == "interrupted" and job.restarts == 0
    assert job.run.store.committed()[-1] == max(job.run.losses) < STEPS
    assert not (job.run.folder / "STOP").exists()
    again = submit(folder, "canceled", *overrides)
    again.finish()
    assert sorted(again.run.steps) == [*range(1, STEPS + 1)]
    assert again.run.losses == unbroken(2)


def test_each_task_of_an_array_trains_a_run_of_its_own(cluster: Cluster, folder: Path) -> None:
    tasks = ("training.seed=1", "training.seed=2", "training.seed=1 optimizer.lr=1e-3")
    job = submit(folder, "sweep", "parallel.tensor=1", "training.steps=4", f"submit.array={list(tasks)}")
    job.wait_until_over()
    assert job.states == ["COMPLETED"] * 3, job.log()
    one, two, three = (Run(folder / "runs" / f"sweep-{number}").losses for number in range(3))
    assert one[1] == three[1] != two[1]
    assert one[4] != three[4]
    assert call(folder, "logs", "sweep").stdout.count("step 4/4") == 3


def test_the_jobs_of_a_chain_go_on_with_one_run(cluster: Cluster, folder: Path, unbroken: Losses) -> None:
    job = submit(folder, "chained", *RANKS_2, "submit.chain=2", "cluster.max_requeues=0", slowly(folder))
    assert job.states[1] == "PENDING"
    job.wait_for_training()
    no_more_faults(folder)
    slurm("scancel", "--batch", "--signal=USR1", job.id)
    job.wait_until_over()
    assert job.states == ["FAILED", "COMPLETED"]
    assert "is not requeued: cluster.max_requeues=0" in job.log()
    assert sorted(job.run.steps) == [*range(1, STEPS + 1)]
    assert job.run.losses == unbroken(2)


def test_with_a_torchrun_on_each_node_the_run_is_saved_requeued_and_goes_on_too(
    cluster: Cluster, folder: Path, unbroken: Losses
) -> None:
    job = submit(folder, "elastic", *RANKS_2, "cluster.slurm.launcher=torchrun", slowly(folder))
    job.wait_for_training()
    no_more_faults(folder)
    # As Slurm sends it where --signal has no B: to the script and every process of the job at once.
    slurm("scancel", "--full", "--signal=USR1", job.id)
    job.finish()
    assert job.restarts == 1
    assert sorted(job.run.steps) == [*range(1, STEPS + 1)]
    assert job.run.losses == unbroken(2)
