"""A rank that takes longer than the others by itself is reported, and nobody else ever."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.distributed import run_distributed
from titans_dist.config import ParallelConfig
from titans_dist.parallel.processes import make_groups
from titans_dist.parallel.stragglers import Stragglers

Work = Callable[[int, int], float]
"""(rank, step) -> seconds of work."""


def forward(seconds: float) -> None:
    time.sleep(seconds)


def reported(work: Work, world: int, steps: int, factor: float = 1.5, pipeline: int = 1) -> list[dict[str, Any]]:
    """What rank 0 has reported after `steps` synchronous steps; two ranks share a host."""

    def train(rank: int, world: int) -> list[dict[str, Any]]:
        make_groups(ParallelConfig(pipeline=pipeline))
        with mock.patch.object(socket, "gethostname", lambda: f"node{rank // 2}"):
            stragglers = Stragglers(factor)
        rows = []
        for step in range(1, steps + 1):
            stragglers.begin_step()
            forward(work(rank, step))
            dist.all_reduce(torch.ones(4))
            rows += stragglers.end_step(step)
        return rows

    everywhere = run_distributed(train, world)
    assert everywhere[1:] == [[]] * (world - 1), "rank 0 alone reports"
    rows: list[dict[str, Any]] = everywhere[0]
    return rows


def test_a_slow_rank_is_reported_with_its_host_and_a_fast_one_never() -> None:
    rows = reported(lambda rank, step: 0.2 if rank == 2 else 0.05, world=4, steps=30)
    assert rows and {(row["name"], row["rank"], row["host"]) for row in rows} == {("straggler", 2, "node1")}
    for row in rows:
        assert 0.15 < row["own_s"] < 0.6, row
        assert row["own_s"] > 1.5 * row["median_s"], row


def test_of_two_ranks_the_slow_one_is_reported() -> None:
    rows = reported(lambda rank, step: 0.2 if rank == 0 else 0.05, world=2, steps=30)
    assert rows and {row["rank"] for row in rows} == {0}


def test_nothing_is_reported_of_equal_ranks() -> None:
    rows = reported(lambda rank, step: 0.1, world=4, steps=50, factor=2)
    assert [row for row in rows if row["name"] == "straggler"] == []  # a busy machine may have slow steps


def test_short_steps_are_compared_once_there_are_enough_samples() -> None:
    """Steps of some milliseconds: one window of them is seen a handful of times, which tells nothing."""
    rows = reported(lambda rank, step: 0.04 if rank == 1 else 0.004, world=2, steps=200)
    assert rows and {row["rank"] for row in rows} == {1}
    assert len(rows) < 10


def test_stages_of_a_pipeline_may_differ() -> None:
    rows = reported(lambda rank, step: 0.2 if rank >= 2 else 0.05, world=4, steps=30, pipeline=2)
    assert rows == []


def test_a_single_slow_step_is_its_hosts() -> None:
    def work(rank: int, step: int) -> float:
        return 1.0 if (rank, step) == (3, 17) else 0.05

    rows = [row for row in reported(work, world=4, steps=20) if row["name"] == "slow_step"]
    assert [(row["step"], row["host"]) for row in rows] == [(17, "node1")]
    assert rows[0]["seconds"] >= 1.0 and rows[0]["median_s"] < 0.3 and rows[0]["own_s"] > 0.7


def test_a_step_that_is_slow_everywhere_is_no_hosts() -> None:
    rows = reported(lambda rank, step: 1.0 if step == 17 else 0.05, world=4, steps=20)
    assert [(row["name"], row["step"], row["host"]) for row in rows] == [("slow_step", 17, "all")]


def test_turned_off_nothing_is_compared() -> None:
    assert reported(lambda rank, step: 0.3 if rank else 0.01, world=2, steps=12, factor=0) == []
