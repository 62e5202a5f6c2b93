"""Workers that die are started again, ends that a new start cannot mend are not, and a stop is obeyed at any time."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.launch.command_line import Cli
from tests.launch.jobs import ONCE, TRAIN, Job, alive, foreign_torchrun, logs
from titans_dist.tracking import losses, read_metrics

SHORT = ["training.steps=30", "checkpoint.interval=10"]


def starts(folder: Path, rank: int = 1) -> int:
    """How often the training loop has begun."""
    return logs(folder)[f"train-rank{rank}.log"].count(f"rank {rank} of 2")


def resumed(folder: Path) -> list[int]:
    rows = read_metrics(folder / "runs" / "run" / "metrics.jsonl")
    return [row["step"] for row in rows if row.get("name") == "resume"]


@pytest.mark.parametrize("death", ["SIGKILL:1", "SIGKILL:0", "bug:1"])
def test_the_job_goes_on_from_the_newest_checkpoint_after_a_worker_died(
    death: str, stubbed: Cli, tmp_path: Path
) -> None:
    run = stubbed(*TRAIN, *SHORT, STUB_FAIL=death, STUB_STEP="12", STUB_ATTEMPTS="1")
    assert run.returncode == 0, run.stderr
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"titans-dist: rank {death[-1]} on ")
    assert ("SIGKILL" if "SIGKILL" in death else "ZeroDivisionError: a bug in the program") in line
    assert line.endswith("; starting all again from the newest checkpoint, 2 of 3 restarts left")
    assert resumed(tmp_path) == [10]
    assert sorted(losses(tmp_path / "runs" / "run" / "metrics.jsonl")) == list(range(1, 31))
    assert not (tmp_path / "runs" / "run" / "postmortem").exists()


def test_restarts_are_bounded_and_a_death_that_comes_back_is_told_as_such(stubbed: Cli, tmp_path: Path) -> None:
    run = stubbed(*TRAIN, *SHORT, "cluster.max_restarts=1", STUB_FAIL="SIGKILL:1", STUB_STEP="12")
    assert run.returncode == 1
    again, sentence, same, postmortem = run.stderr.splitlines()
    assert again.endswith("0 of 1 restart left")
    assert sentence.startswith("titans-dist: rank 1 ended without a word (SIGKILL")
    assert same.startswith("titans-dist: all 2 attempts ended like this after step 12; ")
    assert postmortem.startswith("titans-dist: postmortem in ")
    assert starts(tmp_path) == 2


def test_deaths_at_different_places_are_not_told_to_be_the_same(stubbed: Cli) -> None:
    run = stubbed(*TRAIN, *SHORT, "cluster.max_restarts=1", STUB_FAIL="SIGKILL:1", STUB_STEP="12,17")
    assert run.returncode == 1
    assert "attempts ended like this" not in run.stderr


@pytest.mark.parametrize(
    ("failure", "code"), [("ConfigError", 2), ("Interrupted", 3), ("CheckpointError:1", 4), ("HealthError", 5)]
)
def test_what_a_new_start_cannot_mend_is_not_started_again(
    failure: str, code: int, stubbed: Cli, tmp_path: Path
) -> None:
    run = stubbed(*TRAIN, *SHORT, STUB_FAIL=failure)
    assert run.returncode == code
    assert run.stderr.startswith("titans-dist: a sentence from rank ")
    assert "starting all again" not in run.stderr
    assert starts(tmp_path) == 1


@pytest.mark.parametrize(
    ("failure", "code"), [("ConfigError", 2), ("Interrupted", 3), ("CheckpointError:0", 4), ("HealthError:0", 5)]
)
def test_a_foreign_torchrun_starts_workers_again_that_end_at_once_with_the_same_code(
    failure: str, code: int, tmp_path: Path
) -> None:
    run = foreign_torchrun(tmp_path, *SHORT, restarts=1, STUB_FAIL=failure)
    assert run.returncode == 1  # torchrun's own
    assert run.stdout.count("rank 0 of 2") == starts(tmp_path) == 1
    assert "titans-dist: a sentence from rank 0\n" in run.stderr
    assert run.stderr.count(f"(exitcode: {code})") == 2


def test_under_a_foreign_torchrun_workers_that_died_do_resume(tmp_path: Path) -> None:
    run = foreign_torchrun(tmp_path, *SHORT, restarts=2, STUB_FAIL="SIGKILL:1", STUB_STEP="12", STUB_ATTEMPTS="1")
    assert run.returncode == 0, run.stderr
    assert resumed(tmp_path) == [10]


def test_the_end_of_an_earlier_job_stops_no_later_one(stubbed: Cli, tmp_path: Path) -> None:
    assert stubbed(*TRAIN, *SHORT, STUB_FAIL="HealthError").returncode == 5
    later = stubbed(*TRAIN, *SHORT, STUB_FAIL="SIGKILL:1", STUB_STEP="12", STUB_ATTEMPTS="1")
    assert later.returncode == 0, later.stderr
    assert resumed(tmp_path) == [10]


def test_torchrun_leaves_those_alone_that_still_save_when_the_first_has_ended(stubbed: Cli, tmp_path: Path) -> None:
    run = stubbed(*TRAIN, *SHORT, STUB_FAIL="Interrupted", STUB_LATER_S="2")
    assert run.returncode == 3
    assert logs(tmp_path)["train-rank1.log"].endswith("titans-dist: a sentence from rank 1\n")
    assert logs(tmp_path)["train-torchrun.log"] == ""


@pytest.mark.parametrize(("timeout_s", "is_saved"), [(1, False), (60, True)])
def test_after_a_signal_workers_get_the_time_that_the_configuration_gives_them(
    timeout_s: int, is_saved: bool, tmp_path: Path
) -> None:
    job = Job(tmp_path, f"cluster.timeout_s={timeout_s}", STUB_SAVE_S="4")
    job.wait_for_steps(3)
    children = job.descendants()
    job.process.terminate()
    job.end()
    assert ("stopped and saved" in logs(tmp_path)["train-rank1.log"]) is is_saved
    assert alive(children) == []


def test_a_stop_while_workers_are_started_again_ends_the_job(tmp_path: Path) -> None:
    job = Job(tmp_path, STUB_FAIL="SIGKILL:1", STUB_STEP="5")
    job.wait_until(lambda: "closing signal" in logs(tmp_path).get("train-torchrun.log", ""))
    children = job.descendants()
    job.process.terminate()
    code, _, err = job.end()
    assert code == 3, err
    assert err == "titans-dist: stopped while the workers did not run, start it again to go on\n"
    assert alive(children) == []
    assert starts(tmp_path) == 1


def test_a_stop_after_a_restart_saves(tmp_path: Path) -> None:
    job = Job(tmp_path, "checkpoint.interval=5", STUB_FAIL="SIGKILL:1", STUB_STEP="7", STUB_ATTEMPTS="1")
    metrics = job.run_dir / "metrics.jsonl"
    job.wait_until(lambda: metrics.exists() and max(losses(metrics), default=0) > 10)
    job.process.terminate()
    code, _, err = job.end()
    assert code == 3
    assert err.splitlines()[-1].startswith("titans-dist: stopped and saved at step ")


def test_a_worker_that_torchrun_stopped_after_a_death_is_not_a_job_that_was_stopped(stubbed: Cli) -> None:
    run = stubbed(*TRAIN, *ONCE, STUB_FAIL="SIGKILL:1", STUB_STEP="0", STUB_START_S="30")  # rank 0 does not save yet
    assert run.returncode == 1
    assert run.stderr.startswith("titans-dist: rank 1 ended without a word")


def test_where_torchrun_is_killed_its_workers_save_and_end(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.wait_for_steps(3)
    children = job.descendants()
    job.torchrun().kill()
    code, _, err = job.end()
    assert code == 3
    assert err.startswith("titans-dist: stopped and saved at step ")
    assert alive(children) == []


def test_a_hung_worker_shows_where_it_is_on_sigquit(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.wait_for_steps(1)
    workers = [child for child in job.descendants() if child.environ().get("RANK") == "1"]
    os.kill(workers[0].pid, signal.SIGQUIT)
    job.wait_until(lambda: "stub_training.py" in logs(tmp_path).get("train-rank1.log", ""))
    job.process.terminate()
    assert job.end()[0] == 3
