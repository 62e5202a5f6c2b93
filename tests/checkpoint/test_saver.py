"""Saving beside training: the state at the start is what is saved, and a failure is one sentence on all ranks."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.checkpoint.small_training import Layout, SmallTraining
from tests.checkpoint.test_sharded import limit_file_size, state
from tests.distributed import run_distributed
from titans_dist.checkpoint.lease import Lease
from titans_dist.checkpoint.saver import Saver, SaveResult
from titans_dist.checkpoint.sharded import check_space, load
from titans_dist.checkpoint.store import Store
from titans_dist.config.errors import CheckpointError
from titans_dist.config.run import CheckpointConfig


def settings(**changes: Any) -> CheckpointConfig:
    return CheckpointConfig(**{"keep": 2, "retries": 0} | changes)


def quick_pauses() -> None:
    """In the forked process of a rank; the parent never waits between attempts."""
    from titans_dist.checkpoint import saver

    saver.PAUSE_S = 0.05


# Training goes on


def change_while_saving(rank: int, world: int, root: Path, asynchronous: bool) -> tuple[SaveResult | None, dict]:
    """Training changes tensors, plain numbers and meta in place as soon as it may."""
    saver = Saver(Store(root), settings(asynchronous=asynchronous))
    live, meta = state(rank, world, 7), {"tokens": 7, "health": {"losses": [1.0]}}
    saver.start(7, live, meta)
    live["split"].data.zero_()
    live["common"].data.zero_()
    live["plain"]["steps"][1].zero_()
    meta["health"]["losses"].append(2.0)
    value = torch.ones(2)
    for _ in range(20):  # training has its own collectives meanwhile
        dist.all_reduce(value)
    result = saver.wait()
    saver.close()
    return result, load(Store(root), 7, state(rank, world, -1))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_state_at_the_start_is_saved_whatever_training_does_next(tmp_path: Path, asynchronous: bool) -> None:
    ranks = run_distributed(change_while_saving, 2, tmp_path, asynchronous)
    for rank, (result, loaded) in enumerate(ranks):
        expected = state(rank, 2, 7)
        assert result.error is None and result.attempts == 1 and result.step == 7
        assert torch.equal(loaded["split"], expected["split"].data)
        assert torch.equal(loaded["common"], expected["common"].data)
        assert loaded["plain"] == expected["plain"]
    assert ranks[0][0] == ranks[1][0]
    assert ranks[0][0].bytes == sum(path.stat().st_size for path in Store(tmp_path).folder(7).iterdir()) - (
        (Store(tmp_path).folder(7) / "manifest.json").stat().st_size
    )
    assert Store(tmp_path).meta(7) == {"tokens": 7, "health": {"losses": [1.0]}}
    Store(tmp_path).verify(7)


def hold_the_writer(rank: int, world: int, root: Path) -> list[Any]:
    """The thread stands still in the middle of the save until it is let go."""
    from titans_dist.checkpoint import saver as module

    gate = threading.Event()

    class Held(module.Plan):
        def write(self, folder: Path) -> Any:
            gate.wait(60)
            return super().write(folder)

    module.Plan = Held  # type: ignore[misc]
    saver = Saver(Store(root), settings())
    seen: list[Any] = [saver.busy, saver.finished()]
    saver.start(1, state(rank, world, 1), {})
    seen += [saver.busy, saver.finished()]
    with pytest.raises(RuntimeError, match="a save is under way"):
        saver.start(2, state(rank, world, 2), {})
    gate.set()
    while (result := saver.finished()) is None:
        time.sleep(0.01)
    seen += [result.error, saver.busy, saver.finished(), saver.wait()]
    saver.start(2, state(rank, world, 2), {})
    last = saver.wait()
    assert last is not None
    saver.close()
    return [*seen, last.step, last.error]


def test_nothing_waits_for_the_writer_unless_asked_to(tmp_path: Path) -> None:
    for seen in run_distributed(hold_the_writer, 2, tmp_path):
        assert seen == [False, None, True, None, None, False, None, None, 2, None]


def save_real_training(rank: int, world: int, root: Path) -> list[torch.Tensor]:
    """Step 1 is saved while steps 2 to 4 are made, then loaded and made again."""
    training = SmallTraining(Layout())
    saver = Saver(Store(root), settings())
    training.train(1, 1)
    saver.start(1, training.state(), {})
    training.train(2, 4)
    result = saver.wait()
    assert result is not None and result.error is None
    saver.close()
    unbroken = training.parameters()
    again = SmallTraining(Layout(), seed=99)
    again.take(load(Store(root), 1, again.state(is_loading=True)))
    again.train(2, 4)
    return [*unbroken.values(), *again.parameters().values()]


def test_a_run_resumed_from_a_save_beside_training_equals_the_unbroken_one(tmp_path: Path) -> None:
    for values in run_distributed(save_real_training, 2, tmp_path):
        unbroken, resumed = values[: len(values) // 2], values[len(values) // 2 :]
        assert all(torch.equal(one, other) for one, other in zip(unbroken, resumed, strict=True))


def buffers_of_two_saves(rank: int, world: int, root: Path) -> tuple[list[int], list[int], list[bool]]:
    saver = Saver(Store(root), settings())
    places = []
    for step in (1, 2):
        saver.start(step, state(rank, world, step), {})
        saver.wait()
        places.append([buffer.data_ptr() for buffer in saver._buffers._buffers.values()])
    private = state(rank, world, 3)
    saver.start(3, private, {}, private=("split",))
    result = saver.wait()
    loaded = load(Store(root), 3, state(rank, world, -1))
    saver.close()
    assert result is not None
    return *places, [result.error is None, torch.equal(loaded["split"], private["split"].data)]


def test_memory_is_used_again_and_only_a_writer_has_a_copy(tmp_path: Path) -> None:
    (first, second, private), (other, _, _) = run_distributed(buffers_of_two_saves, 2, tmp_path)
    assert first == second and len(first) == 2
    assert len(other) == 1, "the tensor that all have is written by rank 0 alone"
    assert private == [True, True]


def peak_memory(rank: int, world: int, root: Path) -> list[float]:
    """Peak of the resident memory during each of two saves beyond what was there, as a share of this rank's bytes.

    A small save comes before: the code that the first one brings in is no part of the copy.
    """
    from megatron.core.dist_checkpointing import ShardedTensor

    count, size = 8, 1 << 21
    live = {f"t{i}": torch.ones(size) for i in range(count)}
    saver = Saver(Store(root), settings())
    saver.start(1, state(rank, world, 1), {})
    saver.wait()
    before, shares = resident("VmRSS"), []
    for step in (2, 3):
        sharded = {key: ShardedTensor.from_rank_offsets(key, value, (0, rank, world)) for key, value in live.items()}
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        saver.start(step, sharded, {"health": {"updates": 0}})
        saver.wait()
        shares.append((resident("VmHWM") - before) / (count * size * 4))
    saver.close()
    return shares


def resident(what: str) -> int:
    (line,) = re.findall(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) * 1024


def test_the_copy_takes_little_more_memory_than_what_a_rank_writes(tmp_path: Path) -> None:
    for first, second in run_distributed(peak_memory, 2, tmp_path):
        assert 0.9 < first < 1.3
        assert 0.9 < second < 1.3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_copy_from_a_gpu_is_page_locked_and_is_what_was_there() -> None:
    """In a process of its own: CUDA and forked ranks do not go together."""
    code = """
    import torch, torch.distributed as dist
    from megatron.core.dist_checkpointing import ShardedTensor
    from titans_dist.checkpoint.host import HostBuffers
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    buffers = HostBuffers()
    live = {"large": torch.randn(3 << 20, device="cuda"), "small": torch.randn(10, device="cuda")}
    for _ in range(2):
        expected = {key: value.cpu() for key, value in live.items()}
        copy = buffers.copy({key: ShardedTensor.from_rank_offsets(key, value) for key, value in live.items()}, True)
        for key, value in live.items():
            value.add_(1)
            (part,) = copy.tensors[key]
            assert torch.equal(part.data, expected[key]) and part.data.is_pinned()
    buffers.release()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=Path(__file__).parents[2])


# Failures


def fail_once(rank: int, world: int, root: Path, full: set[int], retries: int) -> list[SaveResult | None]:
    """The disk of some ranks is full for the first attempt."""
    from titans_dist.checkpoint import saver as module

    quick_pauses()
    pauses: list[float] = []
    sleep = time.sleep

    def make_room(seconds: float) -> None:
        pauses.append(seconds)
        limit_file_size(0)
        sleep(seconds)

    module.time = type("Time", (), {"sleep": staticmethod(make_room), "monotonic": staticmethod(time.monotonic)})  # type: ignore[assignment]
    saver = Saver(Store(root), settings(retries=retries))
    if rank in full:
        limit_file_size(10_000)
    results = []
    for step in (1, 2):
        saver.start(step, state(rank, world, step), {})
        results.append(saver.wait())
        limit_file_size(0)
    saver.close()
    return [*results, pauses]  # type: ignore[list-item]


@pytest.mark.parametrize("full", [{0}, {1}, {0, 1}])
def test_a_full_disk_is_tried_again_from_the_same_copy_and_passes_when_there_is_room(
    tmp_path: Path, full: set[int]
) -> None:
    for first, second, pauses in run_distributed(fail_once, 2, tmp_path, full, 2):
        assert (first.error, first.attempts) == (None, 2)
        assert (second.error, second.attempts) == (None, 1)
        assert len(pauses) == 1
    store = Store(tmp_path)
    assert store.committed() == [1, 2] and store.leftovers() == []
    store.verify(1)
    loaded = run_distributed(load_all, 1, tmp_path, 1)[0]
    assert torch.equal(loaded, torch.cat([state(rank, 2, 1)["split"].data for rank in range(2)]))


def load_all(rank: int, world: int, root: Path, step: int) -> torch.Tensor:
    split: torch.Tensor = load(Store(root), step, state(rank, world, -1))["split"]
    return split


def test_without_retries_the_failure_is_told_and_the_next_save_succeeds(tmp_path: Path) -> None:
    ranks = run_distributed(fail_once, 2, tmp_path, {1}, 0)
    assert ranks[0][0] == ranks[1][0]
    for first, second, pauses in ranks:
        assert first.error.startswith("cannot save step 1: rank 1: ") and "File too large" in first.error
        assert (first.attempts, first.bytes, first.is_fenced) == (1, 0, False)
        assert second.error is None and pauses == []
    assert Store(tmp_path).committed() == [2]


def fail_for_ever(rank: int, world: int, root: Path) -> tuple[SaveResult | None, list[float]]:
    from titans_dist.checkpoint import saver as module

    pauses: list[float] = []
    module.time = type("Time", (), {"sleep": staticmethod(pauses.append), "monotonic": staticmethod(time.monotonic)})  # type: ignore[assignment]
    saver = Saver(Store(root), settings(retries=3))
    if rank == 1:
        limit_file_size(10_000)
    saver.start(1, state(rank, world, 1), {})
    result = saver.wait()
    saver.close()
    return result, pauses


def test_pauses_grow_and_end(tmp_path: Path) -> None:
    for result, pauses in run_distributed(fail_for_ever, 2, tmp_path):
        assert result.attempts == 4 and result.error is not None
        assert len(pauses) == 3 and pauses == sorted(set(pauses))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_is_really_full_commits_nothing_and_passes_when_there_is_room(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], check=False).returncode != 0:
        pytest.skip("this machine does not let root mount a small disk")
    try:
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(150_000))
        ranks = run_distributed(fill_up_and_make_room, 2, disk / "checkpoints", ballast)
        for full, later in ranks:
            assert os.strerror(errno.ENOSPC) in full.error
            assert later.error is None
        store = Store(disk / "checkpoints")
        assert store.committed() == [1, 3] and store.leftovers() == []
        store.verify(3)
    finally:
        subprocess.run(["umount", disk], check=True)


def fill_up_and_make_room(rank: int, world: int, root: Path, ballast: Path) -> list[SaveResult | None]:
    saver = Saver(Store(root), settings())
    results = []
    for step in (1, 2, 3):
        if step == 3 and rank == 0:
            ballast.unlink()
        dist.barrier()
        saver.start(step, state(rank, world, step), {})
        results.append(saver.wait())
    saver.close()
    return results[1:]


def save_with_lease(rank: int, world: int, root: Path, retries: int, place: str) -> list[SaveResult | None]:
    """While step 2 is written, a later start of the job takes over and commits a step 2 of its own."""
    from titans_dist.checkpoint import lease as lease_module
    from titans_dist.checkpoint import saver as module

    quick_pauses()
    lease_module.SETTLE_S = 0.05
    os.environ["SLURM_JOB_ID"] = "7"
    store = Store(root)
    if rank == 0:
        store.lease = Lease.acquire(root)
    saver = Saver(store, settings(retries=retries))
    saver.start(1, state(rank, world, 1), {"from": "earlier"})
    results = [saver.wait()]

    class TakenOver(module.Plan):
        def write(self, folder: Path) -> Any:
            files = super().write(folder) if place == "before the commit" else None
            if rank == 0 and step == 2:
                os.environ["SLURM_RESTART_COUNT"] = "1"
                later = Store(root, Lease.acquire(root))
                (later.begin(2) / "a.bin").write_bytes(b"later")
                later.commit(2, {"from": "later"})
            dist.barrier(self.ranks.group)
            return super().write(folder) if files is None else files

    module.Plan = TakenOver  # type: ignore[misc]
    for step in (2, 3):
        saver.start(step, state(rank, world, step), {"from": "earlier"})
        results.append(saver.wait())
    saver.close()
    return results


@pytest.mark.parametrize("retries", [0, 2])
@pytest.mark.parametrize("place", ["before its files are written", "before the commit"])
def test_a_start_that_was_fenced_off_in_a_save_says_so_and_is_not_tried_again(
    tmp_path: Path, retries: int, place: str
) -> None:
    ranks = run_distributed(save_with_lease, 2, tmp_path, retries, place)
    assert ranks[0] == ranks[1]
    sound, fenced, after = ranks[0]
    assert sound.error is None and not sound.is_fenced
    for result in (fenced, after):
        assert result.is_fenced and result.attempts == 1
        assert "has taken this run over" in result.error
    store = Store(tmp_path)
    assert store.committed() == [1, 2]
    assert store.meta(2) == {"from": "later"}
    store.verify(2)


def miss_a_save(rank: int, world: int, root: Path) -> list[SaveResult | None]:
    """Rank 1 is not there for the first save, which must end nevertheless."""
    saver = Saver(Store(root), settings(retries=2), timeout_s=1)
    results: list[SaveResult | None] = []
    if rank == 0:
        for step in (1, 2):
            saver.start(step, state(rank, world, step), {})
            results.append(saver.wait())
    dist.barrier()
    saver.close()
    return results


def test_a_rank_that_does_not_answer_ends_the_save_and_not_the_process(tmp_path: Path) -> None:
    (first, second), _ = run_distributed(miss_a_save, 2, tmp_path)
    assert first.error.startswith("cannot save step 1: rank 0 has lost the other ranks: ")
    assert second.error is not None and not second.is_fenced
    assert Store(tmp_path).committed() == []


def test_a_save_that_hangs_does_not_keep_the_process_alive(tmp_path: Path) -> None:
    code = f"""
    import sys, time
    from pathlib import Path
    import torch, torch.distributed as dist
    from titans_dist.checkpoint import saver as module
    from titans_dist.checkpoint.store import Store
    from titans_dist.config.run import CheckpointConfig
    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method="file://{tmp_path}/meet", rank=rank, world_size=2)
    module.LEAVE_S = 0.1
    saver = module.Saver(Store(Path("{tmp_path}/checkpoints")), CheckpointConfig())
    if rank == 1:
        time.sleep(600)
    saver.start(1, {{}}, {{}})
    saver.close()
    dist.destroy_process_group()
    print("left", flush=True)
    """
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    processes = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
        for rank in range(2)
    ]
    try:
        output, _ = processes[0].communicate(timeout=120)
        assert (processes[0].returncode, output) == (0, b"left\n")
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()


# Retention, room


def save_some_for_ever(rank: int, world: int, root: Path) -> None:
    saver = Saver(Store(root), settings(keep=2))
    for step in range(1, 7):
        saver.start(step, state(rank, world, step), {}, permanent=step % 3 == 0)
        result = saver.wait()
        assert result is not None and result.error is None and result.prune_error is None
    saver.close()


def test_the_newest_and_the_permanent_ones_are_kept(tmp_path: Path) -> None:
    run_distributed(save_some_for_ever, 2, tmp_path)
    assert Store(tmp_path).committed() == [3, 5, 6]


def test_a_disk_without_room_for_one_checkpoint_is_refused_and_for_few_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10_000_000_000}))
    store = Store(tmp_path / "not" / "yet" / "there")
    with pytest.raises(CheckpointError, match=r"has 10 GB of free space and a checkpoint takes 11 GB: make room"):
        check_space(store, 11_000_000_000, 3)
    warning = check_space(store, 3_000_000_000, 3)
    assert warning is not None and "checkpoint.keep=3 needs room for 4 checkpoints" in warning
    assert check_space(store, 2_500_000_000, 3) is None
    store.begin(1)
    store.commit(1, {})
    assert check_space(store, 3_000_000_000, 3) is None, "those that are there already have their room"
