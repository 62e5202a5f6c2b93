"""One start of one job writes a run's checkpoints; the others are refused, or take over and fence it off."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from titans_dist.checkpoint import lease as module
from titans_dist.checkpoint.lease import FencedError, Lease
from titans_dist.checkpoint.store import Store
from titans_dist.config.errors import CheckpointError

JOB_VARIABLES = (
    *("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "JOBSET_NAME", "JOBSET_RESTART_ATTEMPT"),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.05)
    monkeypatch.setattr(module, "SETTLE_S", 0.05)
    for name in JOB_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def held(root: Path) -> Iterator[Lease]:
    lease = Lease.acquire(root)
    yield lease
    lease.release()


def be(monkeypatch: pytest.MonkeyPatch, **variables: object) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def rewrite(root: Path, **changes: Any) -> None:
    """As if the holder were another process."""
    path = root / "lease.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_held_lease_passes_the_check_and_leaves_nothing_when_released(root: Path) -> None:
    lease = Lease.acquire(root)
    lease.check()
    lease.release()
    assert list(root.iterdir()) == []


def test_another_job_is_refused_and_told_who_holds_it_and_where(root: Path, held: Lease) -> None:
    with pytest.raises(CheckpointError) as error:
        Lease.acquire(root)
    assert str(os.getpid()) in str(error.value) and str(root) in str(error.value)
    assert "stop it, or give this run another name" in str(error.value)
    assert error.value.exit_code == 4
    held.check()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"TORCHELASTIC_RUN_ID": "a"}, {"TORCHELASTIC_RESTART_COUNT": 1}),
        ({"SLURM_JOB_ID": 7, "SLURM_RESTART_COUNT": 1}, {"SLURM_RESTART_COUNT": 2}),
        # All pods of a JobSet are new at a restart, and torchrun is too.
        (
            {"JOBSET_NAME": "a", "JOBSET_RESTART_ATTEMPT": 1, "TORCHELASTIC_RUN_ID": "a"},
            {"JOBSET_RESTART_ATTEMPT": 2, "TORCHELASTIC_RUN_ID": "b"},
        ),
        # A requeued job begins to count its restarts within the job anew.
        (
            {"SLURM_JOB_ID": 7, "TORCHELASTIC_RESTART_COUNT": 3},
            {"SLURM_RESTART_COUNT": 1, "TORCHELASTIC_RESTART_COUNT": 0},
        ),
    ],
)
def test_a_later_restart_of_the_same_job_takes_over_at_once_and_the_earlier_one_is_fenced_off(
    root: Path, monkeypatch: pytest.MonkeyPatch, before: dict[str, object], after: dict[str, object]
) -> None:
    be(monkeypatch, **before)
    earlier = Lease.acquire(root)
    be(monkeypatch, **after)
    later = Lease.acquire(root)
    with pytest.raises(FencedError, match="has taken this run over"):
        earlier.check()
    earlier.release()
    later.check()
    later.release()


def test_an_earlier_start_of_the_same_job_does_not_take_over(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    be(monkeypatch, SLURM_JOB_ID=7, SLURM_RESTART_COUNT=2)
    later = Lease.acquire(root)
    be(monkeypatch, SLURM_RESTART_COUNT=1)
    with pytest.raises(CheckpointError, match="is training this run"):
        Lease.acquire(root)
    later.release()


def test_jobs_that_torchrun_has_no_name_for_are_not_the_same(
    root: Path, monkeypatch: pytest.MonkeyPatch, held: Lease
) -> None:
    be(monkeypatch, TORCHELASTIC_RUN_ID="none", TORCHELASTIC_RESTART_COUNT=1)
    with pytest.raises(CheckpointError, match="is training this run"):
        Lease.acquire(root)


def hold(root: Path, sender: Connection) -> None:
    sender.send(Lease.acquire(root).incarnation)
    signal.pause()


@pytest.mark.parametrize("is_reaped", [True, False])
def test_the_lease_of_a_killed_process_of_this_machine_is_free_at_once(root: Path, is_reaped: bool) -> None:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=hold, args=(root, sender))
    process.start()
    receiver.recv()
    with pytest.raises(CheckpointError, match=str(process.pid)):
        Lease.acquire(root)
    process.kill()
    if is_reaped:
        process.join()
    else:
        while Path(f"/proc/{process.pid}/stat").read_text().split()[2] != "Z":
            time.sleep(0.01)
    lease = Lease.acquire(root)
    lease.check()
    lease.release()
    process.join()


def test_a_later_process_with_the_same_number_is_not_the_holder(root: Path, held: Lease) -> None:
    rewrite(root, started=held.owner.started - 100)
    other = Lease.acquire(root)
    with pytest.raises(FencedError):
        held.check()
    other.release()


@pytest.mark.parametrize("elsewhere", [{"host": "another"}, {"processes": "pid:[1]"}])
def test_a_holder_on_another_machine_lives_while_its_counter_moves(
    root: Path, held: Lease, monkeypatch: pytest.MonkeyPatch, elsewhere: dict[str, str]
) -> None:
    """The number of its process means nothing here, whatever process of this machine has it."""
    rewrite(root, **elsewhere)
    beat = root / f"lease.{held.incarnation}.beat"
    held._stopped.set()  # it would find that the file names another machine; the counter is moved by hand
    held._thread.join()
    count = iter(range(1, 1000))
    sleep = time.sleep

    def sleep_and_beat(seconds: float) -> None:
        sleep(seconds)
        beat.write_text(f"{next(count)}\n")

    monkeypatch.setattr(module.time, "sleep", sleep_and_beat)
    with pytest.raises(CheckpointError, match="is training this run"):
        Lease.acquire(root)
    monkeypatch.setattr(module.time, "sleep", sleep)
    other = Lease.acquire(root)
    other.check()
    assert not beat.exists()
    other.release()


def test_the_counter_is_raised_while_the_lease_is_held(root: Path, held: Lease) -> None:
    beat = root / f"lease.{held.incarnation}.beat"
    before = beat.read_bytes()
    deadline = time.monotonic() + 30
    while beat.read_bytes() == before:
        assert time.monotonic() < deadline, "the counter stands still"
        time.sleep(0.01)


def test_of_two_that_reach_for_it_at_the_same_time_one_gets_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other writes between this one's look at the lease and the end of its wait."""
    others: list[Lease] = []
    sleep = time.sleep

    def overtake(seconds: float) -> None:
        monkeypatch.setattr(module.time, "sleep", sleep)
        (root / "lease.json").unlink()
        others.append(Lease.acquire(root))

    monkeypatch.setattr(module.time, "sleep", overtake)
    with pytest.raises(CheckpointError, match="is training this run"):
        Lease.acquire(root)
    others[0].check()
    others[0].release()


def test_a_lease_that_somebody_deleted_is_written_again(root: Path, held: Lease) -> None:
    (root / "lease.json").unlink()
    held.check()
    with pytest.raises(CheckpointError, match="is training this run"):
        Lease.acquire(root)


def test_a_lease_that_cannot_be_read_is_refused_with_the_mend(root: Path) -> None:
    root.mkdir()
    (root / "lease.json").write_text("{")
    with pytest.raises(CheckpointError, match="delete it if nobody trains this run"):
        Lease.acquire(root)


def test_release_leaves_the_lease_of_another(root: Path, held: Lease) -> None:
    rewrite(root, incarnation="00000000")
    held.release()
    assert json.loads((root / "lease.json").read_text())["incarnation"] == "00000000"


# What a store does with it


def begun(store: Store, step: int, content: bytes) -> Path:
    folder = store.begin(step)
    (folder / "a.bin").write_bytes(content)
    return folder


@pytest.fixture
def two(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Store, Store]]:
    """The stores of an earlier start that is still alive, in the middle of a save, and of a later one."""
    be(monkeypatch, SLURM_JOB_ID=7)
    earlier = Store(root, Lease.acquire(root))
    begun(earlier, 5, b"both")
    earlier.commit(5, {})
    begun(earlier, 10, b"earlier")
    be(monkeypatch, SLURM_RESTART_COUNT=1)
    later = Store(root, Lease.acquire(root))
    yield earlier, later
    for store in (earlier, later):
        assert store.lease is not None
        store.lease.release()


def test_an_earlier_start_cannot_commit_begin_prune_or_discard(two: tuple[Store, Store]) -> None:
    earlier, _ = two
    for forbidden in (
        lambda: earlier.commit(10, {}),
        lambda: earlier.begin(15),
        lambda: earlier.prune(1),
        lambda: earlier.discard_after(0),
    ):
        with pytest.raises(FencedError):
            forbidden()
    assert earlier.committed() == [5]


def test_two_that_write_the_same_step_do_not_mix_their_files(two: tuple[Store, Store]) -> None:
    earlier, later = two
    folder = begun(later, 10, b"later")
    # The earlier one does not know yet that its folder is gone, and goes on writing.
    mixed = earlier._temporary(10)
    mixed.mkdir()
    (mixed / "b.bin").write_bytes(b"earlier")
    assert mixed != folder
    with pytest.raises(FencedError):
        earlier.commit(10, {"from": "earlier"})
    later.commit(10, {"from": "later"})
    later.verify(10)
    assert later.meta(10) == {"from": "later"}
    assert {path.name for path in later.folder(10).iterdir()} == {"a.bin", "manifest.json"}
    later.prune(2)
    assert later.leftovers() == []


def test_begin_makes_room_by_removing_the_leftovers_of_earlier_starts(two: tuple[Store, Store]) -> None:
    earlier, later = two
    assert earlier._temporary(10) in later.leftovers()
    folder = later.begin(20)
    assert later.leftovers() == [folder]


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(two: tuple[Store, Store]) -> None:
    _, later = two
    later.folder(5).rename(later.root / "step_00000005.replaced.tmp")
    assert Store(later.root).newest_valid(lambda sentence: None) is None
    assert later.newest_valid(lambda sentence: None) == 5
