"""When one process of a job is gone, the others say which, and what they were doing; all of them are real."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from tests.distributed import run_distributed
from tests.training.jobs import SIZES, TENSOR_2, Job, job
from tests.training.moments import Before, at_steps
from titans_dist.config import UserError
from titans_dist.parallel import main_thread, peers
from titans_launch import worker

TRAIN = ("train", "data=synthetic", "data.vocab_size=257", *SIZES, *TENSOR_2, "parallel.data=2", "name=mine")
WORLD, HOST = 4, socket.gethostname()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path


def sentences(done: Job, folder: Path, but: int) -> list[str]:
    """The one line that each process but one has left on stderr."""
    said = []
    for rank in range(WORLD):
        if rank != but:
            text = (folder / "runs" / "mine" / "logs" / f"train-rank{rank}.log").read_text() if rank else done.err
            lines = [line for line in text.splitlines() if line.startswith("titans-dist: ")]
            assert len(lines) == 1 and "Traceback" not in text, text
            said.append(lines[0])
    return said


def ended(before: Before, folder: Path, *overrides: str, but: int) -> list[str]:
    with job(folder, *TRAIN, *overrides, world=WORLD, before=before) as done:
        codes = done.wait()
        assert [code for rank, code in enumerate(codes) if rank != but] == [1] * (WORLD - (but >= 0)), codes
        return sentences(done, folder, but)


def test_a_killed_process_is_named_by_all_others(folder: Path) -> None:
    def die(rank: int) -> None:
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    for sentence in ended(at_steps({3: die}), folder, but=2):
        assert f"rank 2 on {HOST} is gone or stopped; rank " in sentence
        assert " among " in sentence or " waiting for a collective" in sentence
        assert sentence.endswith("start the job again to go on from its last checkpoint")
    logs = folder / "runs" / "mine" / "logs"
    for rank in (0, 1, 3):
        assert "RuntimeError: " in (logs / f"stacks-rank{rank}.txt").read_text()
        assert json.loads((logs / f"flight-rank{rank}.json").read_text())["entries"]


def test_a_process_that_stops_is_named_within_the_timeout(folder: Path) -> None:
    def stop(rank: int) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)

    with job(folder, *TRAIN, "cluster.timeout_s=8", world=WORLD, before=at_steps({3: stop})) as stuck:
        for rank in (0, 2, 3):
            stuck.ranks[rank].join(60)
            assert stuck.ranks[rank].exitcode == 1
        said = sentences(stuck, folder, but=1)
    for sentence in said:
        assert sentence.startswith(f"titans-dist: rank 1 on {HOST} is gone or stopped; rank ")


def test_a_process_that_hangs_reports_to_its_launcher_and_ends(folder: Path) -> None:
    reports = folder / "reports"
    reports.mkdir()

    def hang(rank: int) -> None:
        peers.mark("step 3")
        while rank == 1:
            time.sleep(0.1)

    def before(rank: int) -> None:
        os.environ[worker.REPORTS] = str(reports)
        at_steps({3: hang})(rank)

    with job(folder, *TRAIN, "cluster.timeout_s=4", world=WORLD, before=before) as stuck:
        assert stuck.wait() == [1] * WORLD
    said = [json.loads((reports / f"0-{rank}.json").read_text())["text"] for rank in range(WORLD)]
    # The other one learns of it from its sign of life, or from what it has left behind, whichever comes first.
    assert all(f"rank 1 on {HOST} was in step 3, in hang at tests/" in sentence for sentence in said), said
    assert " s; start the job again" in said[1] and said[1].count("without progress for ") == 1
    assert "in hang" in (folder / "runs" / "mine" / "logs" / "stacks-rank1.txt").read_text()


def test_the_last_collective_and_its_ranks_are_those_of_the_traceback() -> None:
    def fail(rank: int, world: int) -> str:
        import torch
        import torch.distributed as dist

        group = dist.new_group([0, 1])
        if rank == 2:
            return ""
        try:
            dist.all_gather_into_tensor(torch.empty(3), torch.empty(1), group=group)
        except RuntimeError as error:
            return main_thread.last_collective(error.__traceback__)
        return "no error"

    said = run_distributed(fail, 3)
    assert [sentence.startswith("all_gather_") and sentence.endswith(" among ranks 0, 1") for sentence in said] == [
        True,
        True,
        False,
    ]


def test_one_process_with_a_trouble_of_its_own_is_quoted(folder: Path) -> None:
    def fail(rank: int) -> None:
        if rank == 3:
            raise UserError("the disk of this machine is on fire; put it out")

    for sentence in ended(at_steps({2: fail}), folder, but=3):
        assert f"rank 3 on {HOST} ended (UserError: the disk of this machine is on fire; put it out)" in sentence


def test_different_versions_are_refused_by_all_before_anything_begins(folder: Path) -> None:
    def older(rank: int) -> None:
        if rank == 1:
            found = peers.own_versions() | {"megatron-core": "0.12.0"}
            mock.patch.object(peers, "own_versions", lambda: found).start()

    version = peers.own_versions()["megatron-core"]
    for sentence in ended(older, folder, but=-1)[:WORLD]:
        different = f"rank 1 runs megatron-core 0.12.0 and rank 0 {version}"
        assert sentence == f"titans-dist: {different}; install the same versions on all machines"
    assert not (folder / "runs" / "mine" / "metrics.jsonl").exists()
