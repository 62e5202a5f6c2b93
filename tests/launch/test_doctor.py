"""`titans-dist doctor`: the processes are real, their machines and what is wrong with them are not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.launch import command_line
from tests.launch.runs import rows
from tests.training.jobs import job
from titans_dist.parallel import diagnosis, machine, preflight
from titans_launch.doctor import exclude

HOSTS = ("node1", "node1", "node2", "node3")


def on_hosts(trouble: Callable[[int], None]) -> Callable[[int], None]:
    """Each rank on its machine of HOSTS, and then in trouble."""

    def before(rank: int) -> None:
        os.environ["SLURMD_NODENAME"] = HOSTS[rank]
        # They share the cores of one machine, and whatever else runs there.
        for limit in ("SLOW_CPU", "SLOW_LINK"):
            mock.patch.object(diagnosis, limit, 1e9).start()
        trouble(rank)

    return before


def examined(
    folder: Path, trouble: Callable[[int], None], *overrides: str, but: int | None = None
) -> tuple[str, list[str], dict[str, str]]:
    """What was printed, the exclude list, and host -> verdict of the table; all ranks must have ended with 1."""
    with job(folder, "doctor", "name=run", *overrides, world=4, before=on_hosts(trouble)) as done:
        codes = done.wait()
    assert [code for rank, code in enumerate(codes) if rank != but] == [1] * (3 + (but is None)), done.out + done.err
    path = folder / "runs" / "run" / "exclude.txt"
    table = {cells[0]: cells[-1] for cells in rows(done.out)[1:]}
    return done.out + done.err, path.read_text().split() if path.exists() else [], table


def test_two_processes_of_this_machine_are_well(tmp_path: Path) -> None:
    done = command_line.run("doctor", "name=run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    header, line = rows(done.stdout)
    assert header[:4] == ["host", "processes", "float32", "bfloat16"]
    assert line[1] == "2" and line[-1] == "ok"
    assert done.stdout.rstrip().endswith("all is well")
    one, other = (json.loads((tmp_path / f"runs/run/doctor/rank{rank}.json").read_text()) for rank in range(2))
    assert one["products"]["float32"]["digest"] == other["products"]["float32"]["digest"]
    assert one["versions"] == other["versions"] and "torch" in one["versions"]
    assert one["link_bytes_per_s"] > 0
    assert not (tmp_path / "runs" / "run" / "exclude.txt").exists()


def test_bad_machines_are_named_and_excluded(tmp_path: Path) -> None:
    def trouble(rank: int) -> None:
        product, usage = machine._product, shutil.disk_usage
        if rank == 2:  # computes wrongly

            def wrong(findings: Any, name: str, device: Any) -> None:
                product(findings, name, device)
                findings.products[name].digest = "0" * 16

            mock.patch.object(machine, "_product", wrong).start()
        if rank == 3:  # has no room
            full = mock.Mock(free=1 << 20)
            mock.patch.object(
                shutil, "disk_usage", lambda path: full if str(path) == "/dev/shm" else usage(path)
            ).start()

    said, excluded, table = examined(tmp_path, trouble)
    assert excluded == ["node2", "node3"]
    assert table == {"node1": "ok", "node2": "BAD", "node3": "BAD"}
    assert "titans-dist: 2 bad hosts: " in said
    assert "other bits of the same float32 product than equal devices" in said
    assert "/dev/shm: 1 MiB free, less than 256" in said


def test_what_was_sent_and_did_not_come_so_is_found(tmp_path: Path) -> None:
    def trouble(rank: int) -> None:
        pattern = preflight._pattern
        if rank == 2:  # what it sends is damaged, and what it gets looks as if it were
            mock.patch.object(preflight, "_pattern", lambda *arguments: pattern(*arguments) + 1).start()

    said, excluded, _ = examined(tmp_path, trouble)
    assert excluded == ["node2"]
    assert "what node2 sent to node3 did not come as it was sent" in said


def test_a_process_that_hangs_is_named_when_the_time_is_over(tmp_path: Path) -> None:
    def trouble(rank: int) -> None:
        if rank == 2:
            mock.patch.object(machine, "_file", lambda *arguments: time.sleep(1000)).start()

    said, excluded, table = examined(tmp_path, trouble, "cluster.timeout_s=5")
    assert excluded == ["node2"]
    assert table["node2"] == "BAD"
    assert "titans-dist: 1 bad host: node2 (rank 2 did not get past a file in the run folder)" in said


@pytest.mark.parametrize("rank", [0, 2])
def test_a_process_that_dies_is_named_at_once(rank: int, tmp_path: Path) -> None:
    def trouble(own: int) -> None:
        if own == rank:
            mock.patch.object(preflight, "_clock_offset", lambda: os.kill(os.getpid(), signal.SIGKILL)).start()

    _, excluded, _ = examined(tmp_path, trouble, but=rank)
    assert excluded == [HOSTS[rank]]
    log = tmp_path / "runs" / "run" / "logs" / "doctor-rank1.log"
    assert f"({'rank ' + str(rank)} is gone or hangs in asking clocks)" in log.read_text()


def test_a_stop_ends_it_and_blames_nobody(tmp_path: Path) -> None:
    def wait(rank: int) -> None:
        mock.patch.object(preflight, "_clock_offset", lambda: time.sleep(1000)).start()

    stages = [tmp_path / "runs" / "run" / "doctor" / f"rank{rank}.json" for rank in range(4)]
    with job(tmp_path, "doctor", "name=run", world=4, before=on_hosts(wait)) as done:
        done.wait_until(lambda: all(path.exists() and "asking clocks" in path.read_text() for path in stages))
        for rank in done.ranks:
            rank.terminate()
        assert done.wait() == [3] * 4
    assert not (tmp_path / "runs" / "run" / "exclude.txt").exists()


def test_the_exclude_list_keeps_what_was_not_examined_again(tmp_path: Path) -> None:
    exclude(tmp_path, ["a", "b", "c"], ["a", "b"])
    assert (tmp_path / "exclude.txt").read_text() == "a\nb\n"
    exclude(tmp_path, ["a", "d"], ["d"])  # a was repaired, b left out
    assert (tmp_path / "exclude.txt").read_text() == "b\nd\n"
    exclude(tmp_path, ["b", "d"], [])
    assert not (tmp_path / "exclude.txt").exists()
