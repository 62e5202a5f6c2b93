"""A process that hangs ends by itself, is named by all others with what it was doing, and leaves something to read."""

from __future__ import annotations

import json
import re
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_distributed
from tests.parallel.watched import watched
from titans_dist.config import UserError
from titans_dist.parallel import main_thread, peers, signs, watch
from titans_dist.parallel.signs import Sign, described, not_taking_part

HOST = socket.gethostname()


def spin() -> None:
    while True:
        pass


def steps(count: int) -> None:
    for step in range(1, count + 1):
        peers.mark(f"step {step}")
        dist.all_reduce(torch.ones(2))


def test_a_rank_in_an_endless_loop_is_named_with_its_step_and_its_line(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        steps(3)
        if rank == 1:
            spin()
        steps(4)

    with watched(tmp_path, 3, work) as ranks:
        assert ranks.join() == [1, 1, 1]
        first = spin.__code__.co_firstlineno
        place = rf"spin at tests/parallel/test_watch\.py:({first + 1}|{first + 2})"
        for rank in (0, 2):
            said = ranks.said(rank)
            assert said.startswith(f"titans-dist: rank 1 on {HOST} ") and said.count("\n") == 1
            assert "in step 3, in spin at tests/parallel/test_watch.py:" in said
            assert f"; rank {rank} was in all_reduce among all ranks; start the job again" in said
        assert re.fullmatch(
            rf"titans-dist: rank 1 on {HOST} was in step 3, in {place}, without progress for \d+ s; start .*\n",
            ranks.said(1),
        )
    stacks = (tmp_path / "logs" / "stacks-rank1.txt").read_text()
    assert "in spin" in stacks and "without progress" in stacks
    assert "all_reduce" in (tmp_path / "logs" / "stacks-rank0.txt").read_text()
    flights = [json.loads((tmp_path / "logs" / f"flight-rank{rank}.json").read_text()) for rank in range(3)]
    # The others have begun one collective more than the one that hangs.
    waiting, behind, also_waiting = (flight["entries"][-1]["collective_seq_id"] for flight in flights)
    assert waiting == also_waiting == behind + 1
    assert [flight["entries"][-1]["profiling_name"] for flight in flights] == ["gloo:all_reduce"] * 3


def test_work_that_takes_longer_than_the_timeout_is_no_hang_where_it_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(rank: int) -> None:
        steps(1)
        with peers.busy("the evaluation"):
            time.sleep(5)
        steps(2)

    monkeypatch.setattr(signs, "SILENCE_S", 0.1)
    with watched(tmp_path, 2, work, timeout_s=2) as ranks:
        assert ranks.join() == [0, 0], ranks.said(0)
    assert not (tmp_path / "logs").exists()


def test_the_start_may_take_longer_than_the_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(rank: int) -> None:
        time.sleep(5)
        steps(2)

    monkeypatch.setattr(signs, "SILENCE_S", 0.1)
    with watched(tmp_path, 2, work, timeout_s=2) as ranks:
        assert ranks.join() == [0, 0], ranks.said(0)


def test_steps_of_which_each_is_marked_may_go_on_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(rank: int) -> None:
        for step in range(5):
            peers.mark(f"step {step}")
            time.sleep(1)

    monkeypatch.setattr(signs, "SILENCE_S", 0.1)
    with watched(tmp_path, 2, work, timeout_s=2) as ranks:
        assert ranks.join() == [0, 0], ranks.said(0)


def test_a_rank_that_others_have_left_does_not_sit_there_until_the_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "GONE_S", 2.0)

    def work(rank: int) -> None:
        steps(2)
        if rank == 1:
            raise UserError("the disk of this machine is on fire; put it out")
        spin()

    with watched(tmp_path, 2, work, timeout_s=600) as ranks:
        assert ranks.join() == [1, 1]
        assert ranks.said(0).startswith(f"titans-dist: rank 1 on {HOST} ended (UserError: the disk of this machine is")
        assert f"; rank 0 on {HOST} was in step 2, in spin at tests" in ranks.said(0)


def test_after_a_restart_the_ends_of_the_earlier_processes_count_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("signs", "peers"):
        monkeypatch.setattr(f"titans_dist.parallel.{name}.SILENCE_S", 0.1)
    monkeypatch.setattr(watch, "GONE_S", 1.0)

    def fail(rank: int) -> None:
        steps(2)
        raise UserError("all agree that this goes wrong; do better")

    def pause(rank: int) -> None:
        steps(1)
        time.sleep(5)
        steps(2)

    with watched(tmp_path, 2, fail) as first:
        assert first.join() == [1, 1]
        with watched(tmp_path, 2, pause, timeout_s=600, after=first) as second:
            assert second.join() == [0, 0], second.said(0)


def test_a_rank_that_is_on_its_way_out_is_not_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "GONE_S", 1.0)

    def work(rank: int) -> None:
        steps(2)
        try:
            raise UserError("all agree that this goes wrong; do better")
        finally:
            if rank == 0:
                time.sleep(5)  # closing its books
                print("the books are closed")

    with watched(tmp_path, 2, work, timeout_s=2) as ranks:
        assert ranks.join() == [1, 1]
        assert ranks.said(0) == "the books are closed\ntitans-dist: all agree that this goes wrong; do better\n"


def test_a_hang_that_keeps_pythons_lock_ends_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_LOCKED_S", 1.0)

    def work(rank: int) -> None:
        steps(2)
        time.sleep(2.5)  # the watch looks once a second
        if rank == 0:
            re.match("(a+)+$", "a" * 64 + "b")  # takes some ages, of the universe
        dist.barrier()

    with watched(tmp_path, 2, work) as ranks:
        assert ranks.join() == [1, 1]
        assert "Timeout (0:00:04)!" in ranks.said(0) and f'File "{re.__file__}"' in ranks.said(0)
        assert ranks.said(1).startswith(f"titans-dist: rank 0 on {HOST} is gone or stopped; rank 1 was in barrier")


def test_the_place_of_a_thread_is_its_collective_and_its_own_line() -> None:
    def wait(rank: int, world: int) -> list[main_thread.Place]:
        import threading

        group = dist.new_group([0, 2])
        if rank == 1:
            return []
        if rank == 2:
            time.sleep(1)
        seen: list[main_thread.Place] = []
        looking = threading.Timer(0.4, lambda: seen.append(main_thread.place()))
        looking.start()
        before = main_thread.completed()
        dist.all_reduce(torch.ones(1), group=group)
        looking.join()
        while main_thread.completed() < before + 1:  # the recorder hears of it a moment later
            time.sleep(0.01)
        assert main_thread.completed() == before + 1
        return seen

    first, _, _ = run_distributed(wait, 3)
    assert first[0].collective == "all_reduce among ranks 0, 2"
    assert first[0].line.startswith("wait at tests/parallel/test_watch.py:")


def test_of_ranks_that_wait_for_each_other_the_one_outside_is_late_or_else_the_one_behind() -> None:
    waits, works = Sign(collective="all_reduce among all ranks"), Sign(line="spin at a.py:1", since_s=9)
    assert not_taking_part({0: waits, 1: works, 2: waits, 3: Sign(since_s=20)}) == [3, 1]
    assert not_taking_part({0: waits, 1: waits}) == []
    # As on GPUs, where every main thread waits in a line of its own.
    signs = {
        0: Sign(joined={"world": (7, "all_reduce"), "pair": (5, "all_gather")}),
        1: Sign(joined={"world": (7, "all_reduce"), "pair": (4, "all_gather")}),
        2: Sign(joined={"world": (7, "all_reduce")}),
    }
    assert not_taking_part(signs) == [1]
    assert not_taking_part({0: works, 1: works}) == []


def test_a_process_is_described_by_rank_host_and_what_it_does() -> None:
    sign = Sign(host="node7", doing="step 12", line="forward at titans_dist/layers/mlp.py:33")
    assert described(3, sign) == "rank 3 on node7 was in step 12, in forward at titans_dist/layers/mlp.py:33"
    assert described(3, Sign()) == "rank 3"


def test_marks_mean_nothing_where_nobody_watches() -> None:
    peers.mark("step 1")
    with peers.busy("a save"):
        assert "titans_dist.parallel.peers" in sys.modules
