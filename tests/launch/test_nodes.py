"""Two nodes of one job: a launcher on each, here side by side on this machine; torchrun and processes are real."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.launch.command_line import STUB, command, environment
from tests.launch.jobs import TRAIN, logs
from tests.training.jobs import DATA_2, SIZES
from titans_dist.config import ConfigError
from titans_dist.tracking import losses, read_metrics
from titans_launch import nodes, worker

SHORT = ["training.steps=20", "checkpoint.interval=10"]


class Two:
    """A launcher for each of two nodes."""

    def __init__(self, folder: Path, *arguments: str, stub: bool = True, late: bool = False, **variables: str) -> None:
        """`late`: the second one starts when the first one has ended."""
        self.run_dir = folder / "runs" / "run"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        job = {"PET_NNODES": "2", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port), "PET_RDZV_ID": "job-1"}
        # As under srun, which also makes one task of each node; and as Kubeflow does it, who counts by itself.
        job |= {"SLURM_NTASKS": "2", "PET_NPROC_PER_NODE": "auto"}
        first = (STUB,) if stub else ()
        self.launchers = []
        for rank in range(2):
            if late and rank == 1:
                self.launchers[0].wait(timeout=100)
            self.launchers.append(
                subprocess.Popen(
                    command(*TRAIN, *arguments),
                    cwd=folder,
                    env=environment(*first, **job, PET_NODE_RANK=str(rank), SLURM_PROCID=str(rank), **variables),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def wait_until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert [launcher.poll() for launcher in self.launchers] == [None, None]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def end(self) -> tuple[list[int], list[str], list[str]]:
        """Exit codes, what was printed and what was said, by node."""
        ends = [launcher.communicate(timeout=100) for launcher in self.launchers]
        return [launcher.returncode for launcher in self.launchers], [out for out, _ in ends], [err for _, err in ends]


@contextmanager
def two(folder: Path, *arguments: str, stub: bool = True, late: bool = False, **variables: str) -> Iterator[Two]:
    job = Two(folder, *arguments, stub=stub, late=late, **variables)
    try:
        yield job
    finally:
        for launcher in job.launchers:
            launcher.kill()


def test_the_nodes_make_one_job(tmp_path: Path) -> None:
    with two(tmp_path, *SHORT, "cluster.processes_per_node=2") as job:
        codes, out, err = job.end()
    assert (codes, err) == ([0, 0], ["", ""])
    assert out[0].startswith("rank 0 of 4, ")
    assert "step 20/20" in out[0]
    assert out[1] == ""  # the first node speaks for all
    ranks = {f"train-rank{rank}.log" for rank in range(4)}
    assert set(logs(tmp_path)) == ranks | {"train-torchrun-node0.log", "train-torchrun-node1.log"}
    assert sorted(losses(job.run_dir / "metrics.jsonl")) == list(range(1, 21))


@pytest.mark.parametrize(("failure", "code"), [("ConfigError:1", 2), ("Interrupted", 3), ("HealthError:1", 5)])
def test_both_launchers_end_with_the_code_of_the_job(failure: str, code: int, tmp_path: Path) -> None:
    with two(tmp_path, *SHORT, STUB_FAIL=failure) as job:
        codes, _, err = job.end()
    assert codes == [code, code], err
    rank = failure.partition(":")[2] or "0"
    assert f"titans-dist: a sentence from rank {rank}\n" in err[0]
    bundles = list((job.run_dir / "postmortem").glob("2*")) if code > 3 else []
    assert len(bundles) == int(code > 3)
    for bundle in bundles:
        report = json.loads((bundle / "report.json").read_text())
        assert report["suspect"]["rank"] == int(rank)
        assert [each["rank"] for each in report["ranks"]] == [0, 1]


def test_a_worker_that_is_killed_ends_all_nodes_and_who_started_them_may_start_them_again(tmp_path: Path) -> None:
    variables = {"STUB_FAIL": "SIGKILL:1", "STUB_STEP": "12"}
    with two(tmp_path, *SHORT, **variables) as job:
        codes, _, err = job.end()
    assert codes == [1, 1]
    assert "starting all again" not in err[0] + err[1]
    assert err[1].startswith("titans-dist: rank 1 ended without a word (SIGKILL")
    (bundle,) = (job.run_dir / "postmortem").glob("2*")
    report = json.loads((bundle / "report.json").read_text())
    assert report["suspect"]["why"] == "ended without a word (SIGKILL: killed, or out of memory)"
    assert [each["rank"] for each in report["ranks"]] == [0, 1]
    assert (bundle / "logs" / "train-rank0.log").exists() and (bundle / "logs" / "train-rank1.log").exists()
    with two(tmp_path, *SHORT) as job:
        assert job.end()[0] == [0, 0]
    rows = read_metrics(job.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows if row.get("name") == "resume"] == [10]


def test_a_signal_to_one_launcher_makes_all_save_and_end_with_3(tmp_path: Path) -> None:
    with two(tmp_path, "training.steps=100000") as job:
        metrics = job.run_dir / "metrics.jsonl"
        job.wait_until(lambda: metrics.exists() and len(read_metrics(metrics)) > 4)
        job.launchers[1].terminate()
        codes, _, err = job.end()
    assert codes == [3, 3], err
    assert err[0].startswith("titans-dist: stopped and saved at step ")
    assert read_metrics(metrics)[-1]["name"] == "checkpoint"


@pytest.mark.parametrize("late", [False, True])
def test_where_the_first_node_cannot_prepare_the_data_the_others_do_not_wait_for_it(late: bool, tmp_path: Path) -> None:
    text = ["data=text", "data.source=missing", "data.tokenizer=bytes", "data.path=data/x"]
    with two(tmp_path, *text, late=late) as job:
        codes, _, err = job.end()
    assert codes == [codes[0], codes[0]]
    assert codes[0] in (2, 4)
    assert "missing" in err[0]
    assert "rank" not in "".join(logs(tmp_path).values())


def test_how_an_earlier_job_of_the_same_name_has_ended_is_of_no_concern(tmp_path: Path) -> None:
    with two(tmp_path, *SHORT, STUB_FAIL="ConfigError:1") as job:
        assert job.end()[0] == [2, 2]
    note = job.run_dir / "logs" / "job.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"time": time.time() - 60}))
    with two(tmp_path, *SHORT) as job:
        assert job.end()[0] == [0, 0]


@pytest.mark.slow
def test_two_nodes_train_as_one_does(tmp_path: Path) -> None:
    own = ("data=synthetic", "data.vocab_size=320", *SIZES, *DATA_2)
    with two(tmp_path, *own, stub=False) as job:
        codes, _, err = job.end()
    assert codes == [0, 0], err
    alone = subprocess.run(
        command("train", *own, "name=alone"),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert alone.returncode == 0, alone.stderr
    assert losses(job.run_dir / "metrics.jsonl") == losses(tmp_path / "runs" / "alone" / "metrics.jsonl")


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"PET_NNODES": "1:2"}, "PET_NNODES=1:2 is no whole number >= 1"),
        ({"PET_NODE_RANK": "2"}, "PET_NODE_RANK=2 is no node of PET_NNODES=2"),
        ({"PET_MASTER_ADDR": ""}, "PET_MASTER_ADDR is not set; export the address of the first node"),
        ({"PET_MASTER_PORT": "65536"}, "PET_MASTER_PORT=65536 is no whole number from 1 to 65535"),
    ],
)
def test_what_the_environment_must_say(
    variables: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = {"PET_NNODES": "2", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "node0", "PET_MASTER_PORT": "29500"}
    for name, value in (node | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=sentence):
        nodes.this_node()


def test_who_is_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert worker.is_worker()
    monkeypatch.setenv("PET_NODE_RANK", "1")
    assert not worker.is_worker()  # the task is a launcher
    monkeypatch.setenv("RANK", "3")
    assert worker.is_worker()  # that it has started
    assert nodes.this_node() is None
