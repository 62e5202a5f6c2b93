"""Training on this machine: real torchrun, real processes and signals; only the training loop is a stand-in."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import pytest

from tests.launch.command_line import Cli
from tests.launch.jobs import ONCE, TRAIN, Job, alive, foreign_torchrun, logs
from titans_dist.tracking import losses, read_metrics
from titans_launch import evaluate


def test_rank_0_is_on_the_console_and_every_rank_in_its_log(stubbed: Cli, tmp_path: Path) -> None:
    run = stubbed(*TRAIN, "training.steps=20", "cluster.threads=3")
    assert (run.returncode, run.stderr) == (0, "")
    lines = run.stdout.splitlines()
    assert lines[:2] == ["rank 0 of 2, 3 threads", "rank 0 from below Python"]
    assert lines[2].startswith("step  1/20 | loss")  # no prefix
    assert logs(tmp_path) == {
        "train-rank0.log": run.stdout,
        "train-rank1.log": "rank 1 of 2, 3 threads\nrank 1 from below Python\n",
        "train-torchrun.log": "",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize(
    ("failure", "code", "rank"),
    [("CheckpointError", 4, 0), ("HealthError:1", 5, 1)],  # agreed by all ranks and said once; met by one rank only
)
def test_the_exit_code_and_the_sentence_of_a_worker_get_through(
    failure: str, code: int, rank: int, stubbed: Cli, tmp_path: Path
) -> None:
    run = stubbed(*TRAIN, STUB_FAIL=failure)
    assert run.returncode == code
    sentence, postmortem = run.stderr.splitlines()
    assert sentence == f"titans-dist: a sentence from rank {rank}"
    assert postmortem.startswith("titans-dist: postmortem in runs/run/postmortem/")
    assert logs(tmp_path)[f"train-rank{rank}.log"].endswith(f"{sentence}\n")


def test_a_bug_in_one_rank_shows_its_traceback_only(stubbed: Cli) -> None:
    run = stubbed(*TRAIN, *ONCE, STUB_FAIL="bug:1")
    assert run.returncode == 1
    assert run.stderr.startswith("Traceback (most recent call last)")
    assert run.stderr.splitlines()[-2] == "ZeroDivisionError: a bug in the program"
    assert "ChildFailedError" not in run.stderr + run.stdout


def test_a_killed_worker_is_named(stubbed: Cli) -> None:
    run = stubbed(*TRAIN, *ONCE, "training.steps=100000", STUB_FAIL="SIGKILL:1")
    assert run.returncode == 1
    sentence, postmortem = run.stderr.splitlines()
    named = "rank 1 ended without a word (SIGKILL: killed, or out of memory)"
    assert sentence.startswith(f"titans-dist: {named}; see ")
    assert f"; {named.replace('rank 1', f'rank 1 on {socket.gethostname()}')}" in postmortem


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_reaches_the_workers_and_they_may_save(signum: signal.Signals, tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.wait_for_steps(5)
    children = job.descendants()
    assert len(children) >= 3  # torchrun and two workers
    job.process.send_signal(signum)
    code, _, err = job.end()
    assert code == 3
    assert err.startswith("titans-dist: stopped and saved at step ")
    assert err.count("\n") == 1
    assert alive(children) == []
    assert read_metrics(job.run_dir / "metrics.jsonl")[-1]["name"] == "checkpoint"


def test_a_second_signal_ends_the_job_at_once(tmp_path: Path) -> None:
    job = Job(tmp_path, STUB_DEAF="1")
    job.wait_for_steps(2)
    children = job.descendants()
    job.process.terminate()
    time.sleep(1)
    assert job.process.poll() is None  # the workers do not listen
    job.process.terminate()
    code, _, err = job.end()
    assert code == 1
    assert "ended without a word" in err
    assert "starting all again" not in err
    assert alive(children) == []


def test_a_signal_before_the_workers_began_loses_nothing(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.wait_until(lambda: len(job.descendants()) > 0)
    job.process.terminate()
    code, _, err = job.end()
    assert code == 3
    assert "nothing was lost" in err
    assert not (job.run_dir / "metrics.jsonl").exists()


def test_missing_data_is_prepared_before_the_workers_start(stubbed: Cli, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one line\n" * 100)
    (tmp_path / "b.txt").write_text("another line\n" * 100)
    (tmp_path / "c.txt").write_text("a third\n" * 100)
    overrides = ["data=text", "data.source=.", "data.tokenizer=bytes", "data.path=data/x", "name=run"]
    run = stubbed("train", *overrides, "training.steps=1", "optimizer.warmup_steps=0", "parallel=single")
    assert run.returncode == 0, run.stderr
    assert run.stdout.index("prepare | tokenize") < run.stdout.index("rank 0 of 1")
    assert (tmp_path / "data" / "x" / "dataset.json").exists()


def test_a_sweep_trains_each_job_in_its_own_folder(stubbed: Cli, tmp_path: Path) -> None:
    sweep = ["-m", "training.steps=11,12", "parallel=single", "data=synthetic"]
    run = stubbed("train", *sweep, "training.log_interval=100")
    assert run.returncode == 0, run.stderr
    folders = sorted((tmp_path / "runs").iterdir())
    prefix = "quickstart,data=synthetic,parallel=single,training.log_interval=100,training.steps="
    assert [folder.name for folder in folders] == [f"{prefix}{steps}" for steps in (11, 12)]
    assert [max(losses(folder / "metrics.jsonl")) for folder in folders] == [11, 12]


def test_under_a_foreign_torchrun_each_process_is_a_worker(tmp_path: Path) -> None:
    run = foreign_torchrun(tmp_path, "training.steps=11")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("rank 0 of 2, ")
    assert "rank 1" not in run.stdout + run.stderr
    assert "rank 1 of 2" in logs(tmp_path)["train-rank1.log"]


def test_under_srun_the_ranks_come_from_slurm(stubbed: Cli, tmp_path: Path) -> None:
    slurm = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "MASTER_ADDR": "localhost"}
    slurm |= {"STUB_ALONE": "1"}
    run = stubbed(*TRAIN, "training.steps=11", OMP_NUM_THREADS="1", **slurm)
    assert (run.returncode, run.stdout) == (0, "")
    assert logs(tmp_path) == {"train-rank1.log": "rank 1 of 2, 1 threads\nrank 1 from below Python\n"}


def test_evaluate_prints_the_table_of_rank_0(stubbed: Cli, tmp_path: Path) -> None:
    checkpoint = tmp_path / "runs" / "run" / "checkpoints" / "7"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    run = stubbed("evaluate", "name=run", "parallel=single", "data=synthetic")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("held-out text at step 7")
    assert "2.5000 nats per token" in run.stdout
    assert "runs/run/checkpoints/7" in run.stdout
    assert set(logs(tmp_path)) == {"evaluate-rank0.log", "evaluate-torchrun.log"}


def test_tokens_without_a_text_have_no_bits_per_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = {"step": 1, "loss": 2.0, "bits_per_byte": None, "perplexity": 7.4, "tokens": 10, "bytes": None}
    evaluate.show(result | {"sequences": 1, "seconds": 0.1, "checkpoint": "c"}, tmp_path)
    table = capsys.readouterr().out
    assert "unknown (tokens without a text)" in table
    assert "1 sequences, 10 tokens " in table
