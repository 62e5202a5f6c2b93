"""Real processes: torchrun ranks, jobs side by side, jobs that are killed, and workers started afresh."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from titans_data import BatchSchedule, MdsSource, Mixture, RowOrder

Start = Callable[..., "subprocess.Popen[str]"]

RANK = """
import itertools, sys
import torch
import torch.distributed as dist
from titans_data import BatchSchedule, MdsSource, Mixture, RowOrder, TokenDataset, batches
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
dataset = TokenDataset(MdsSource(sys.argv[1]), 16)
if rank == 1:
    # Opening is no collective: one rank may open what the others do not.
    MdsSource(sys.argv[1], "validation").read(0, 10)
schedule = BatchSchedule(Mixture.of_one(8), [RowOrder(len(dataset), seed=5)])
for step, micro_batches in itertools.islice(batches(dataset, schedule, 2, rank, world, 2, workers=1), 3):
    mine = torch.cat([batch["tokens"] for batch in micro_batches])
    parts = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(parts, mine)
    if rank == 0:
        expected = dataset.stack(schedule.rows(step).tolist())["tokens"]
        print("step", step, torch.equal(torch.cat(parts), expected), flush=True)
dist.destroy_process_group()
"""

READER = """
import sys, time
from titans_data import BatchSchedule, MdsSource, Mixture, RowOrder, TokenDataset, batches
dataset = TokenDataset(MdsSource(sys.argv[1]), 16)
endless = batches(dataset, BatchSchedule(Mixture.of_one(8), [RowOrder(len(dataset), seed=5)]), 0, 0, 1, 2, workers=1)
total = sum(int(batch["tokens"].sum()) for _ in range(4) for batch in next(endless)[1])
print("read", total, flush=True)
if sys.argv[2] == "stay":
    time.sleep(600)
"""

UNPICKLE = """
import pickle, sys
print(int(pickle.load(open(sys.argv[1], "rb")).read(3, 500)[0].sum()))
"""


def streaming_leftovers() -> set[str]:
    """Names as streaming registers them in shared memory: six digits and what they are for."""
    return {path.name for path in Path("/dev/shm").iterdir() if re.match(r"\d{6}_", path.name)}


def expected_total(prepared: Any) -> int:
    """What READER sums up, from the plain stream."""
    schedule = BatchSchedule(Mixture.of_one(8), [RowOrder((len(prepared.train.tokens) - 1) // 16, seed=5)])
    rows = [int(row) for step in range(4) for row in schedule.rows(step)]
    return sum(sum(prepared.train.tokens[row * 16 : row * 16 + 17]) for row in rows)


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], Path]:
    def write(code: str) -> Path:
        (tmp_path / "script.py").write_text(code)
        return tmp_path / "script.py"

    return write


def test_torchrun_ranks_read_the_slices_of_one_global_batch(
    prepared: Any, start: Start, script: Callable[[str], Path]
) -> None:
    job = start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script(RANK), prepared.folder)
    output = job.communicate(timeout=120)[0]
    assert job.returncode == 0, output
    assert [line for line in output.splitlines() if line.startswith("step")] == [
        "step 2 True",
        "step 3 True",
        "step 4 True",
    ], output


def test_a_rank_environment_without_a_process_group_is_no_obstacle(
    prepared: Any, start: Start, script: Callable[[str], Path]
) -> None:
    """WORLD_SIZE may be set, as by a launcher, before torch.distributed is; opening must not wait for the others."""
    world = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    reader = start(script(READER), prepared.folder, "leave", **world)
    assert reader.communicate(timeout=60)[0] == f"read {expected_total(prepared)}\n"


def test_jobs_side_by_side_and_after_a_kill_read_the_same(
    prepared: Any, start: Start, script: Callable[[str], Path]
) -> None:
    before = streaming_leftovers()
    jobs = [start(script(READER), prepared.folder, "stay") for _ in range(2)]
    answer = f"read {expected_total(prepared)}\n"
    assert [job.stdout.readline() for job in jobs if job.stdout] == [answer, answer]
    # Both are alive and hold the folder open when they are killed with all their workers.
    assert [job.poll() for job in jobs] == [None, None]
    for job in jobs:
        os.killpg(job.pid, signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL
    assert streaming_leftovers() <= before
    again = start(script(READER), prepared.folder, "leave")
    assert again.communicate(timeout=60)[0] == answer
    assert again.returncode == 0


def test_a_source_can_be_sent_to_a_freshly_started_process(
    prepared: Any, start: Start, script: Callable[[str], Path], tmp_path: Path
) -> None:
    """As spawned workers receive it: the other process has imported nothing yet."""
    (tmp_path / "source.pickle").write_bytes(pickle.dumps(MdsSource(prepared.folder)))
    job = start(script(UNPICKLE), tmp_path / "source.pickle")
    assert job.communicate(timeout=60)[0] == f"{sum(prepared.train.tokens[3:503])}\n"
