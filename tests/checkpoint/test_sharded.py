"""Collective save and load: bit-equal, on any layout, and with one agreed sentence when anything fails on any rank."""

from __future__ import annotations

import json
import os
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from titans_dist.checkpoint import sharded
from titans_dist.checkpoint.store import Store, sealed
from titans_dist.config.errors import CheckpointError

ROWS = 64


def full(step: int) -> torch.Tensor:
    """(4 * ROWS, 64), the tensor that the ranks hold slices of."""
    return torch.randn(4 * ROWS, 64, generator=torch.Generator().manual_seed(step))


def state(rank: int, world: int, step: int) -> dict[str, Any]:
    """One tensor split over the ranks, one bf16 tensor that all have, and unsharded values."""
    from megatron.core.dist_checkpointing import ShardedTensor

    rows = full(step).chunk(world, 0)[rank].contiguous()
    return {
        "split": ShardedTensor.from_rank_offsets("split", rows, (0, rank, world)),
        "common": ShardedTensor.from_rank_offsets(
            "common", torch.full((3,), step, dtype=torch.bfloat16), replica_id=rank
        ),
        "plain": {"lr": 0.1 + step, "betas": (0.9, 0.95), "steps": {1: torch.tensor(step)}, "none": None},
    }


def save_steps(rank: int, world: int, root: Path, *steps: int) -> list[sharded.SaveResult]:
    return [sharded.save(Store(root), step, state(rank, world, step), {"tokens": step}, keep=2) for step in steps]


def load_step(rank: int, world: int, root: Path, step: int) -> dict[str, Any]:
    return sharded.load(Store(root), step, state(rank, world, -1))


@pytest.mark.parametrize(("world", "new_world"), [(2, 2), (4, 4), (4, 2), (1, 4)])
def test_what_was_saved_is_loaded_bit_by_bit(tmp_path: Path, world: int, new_world: int) -> None:
    for result in run_distributed(save_steps, world, tmp_path, 7):
        assert result[0].error is None
        assert result[0].bytes > full(7).nbytes and result[0].seconds > 0
    loaded = run_distributed(load_step, new_world, tmp_path, 7)
    assert torch.equal(torch.cat([rank["split"] for rank in loaded]), full(7))
    for rank in loaded:
        assert torch.equal(rank["common"], torch.full((3,), 7, dtype=torch.bfloat16))
        assert rank["plain"] == {"lr": 7.1, "betas": (0.9, 0.95), "steps": {1: torch.tensor(7)}, "none": None}
    assert Store(tmp_path).meta(7) == {"tokens": 7}


def test_keep_removes_old_checkpoints(tmp_path: Path) -> None:
    run_distributed(save_steps, 2, tmp_path, 1, 2, 3)
    assert Store(tmp_path).committed() == [2, 3]


def test_no_file_but_the_index_is_a_pickle(tmp_path: Path) -> None:
    run_distributed(save_steps, 2, tmp_path, 1)
    names = {path.name for path in Store(tmp_path).folder(1).iterdir()}
    assert names == {"__0_0.distcp", "__1_0.distcp", ".metadata", "metadata.json", "common.json", "manifest.json"}
    assert json.loads((Store(tmp_path).folder(1) / "common.json").read_text())


# Failures


def limit_file_size(size_bytes: int) -> None:
    """A full disk for this process only: writing beyond ``size_bytes`` of a file fails with EFBIG."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes if size_bytes > 0 else hard, hard))


def save_with_full_disks(
    rank: int, world: int, root: Path, full_ranks: set[int]
) -> tuple[sharded.SaveResult, sharded.SaveResult, sharded.SaveResult]:
    """A good save, one with a full disk on some ranks, and one after there is room again."""
    store = Store(root)
    good = sharded.save(store, 1, state(rank, world, 1), {}, keep=5)
    if rank in full_ranks:
        limit_file_size(10_000)
    failed = sharded.save(store, 2, state(rank, world, 2), {}, keep=5)
    limit_file_size(0)
    again = sharded.save(store, 3, state(rank, world, 3), {}, keep=5)
    return good, failed, again


@pytest.mark.parametrize(("world", "full_ranks"), [(2, {0}), (2, {1}), (2, {0, 1}), (4, {2}), (4, {1, 3})])
def test_full_disk_on_some_ranks_is_one_error_on_all(tmp_path: Path, world: int, full_ranks: set[int]) -> None:
    ranks = run_distributed(save_with_full_disks, world, tmp_path, full_ranks, timeout_s=20)
    errors = {failed.error for _, failed, _ in ranks}
    assert len(errors) == 1
    (error,) = errors
    assert error is not None and error.startswith(f"cannot save step 2: rank {min(full_ranks)}")
    assert "File too large" in error and "\n" not in error
    assert all(good.error is None and again.error is None for good, _, again in ranks)
    assert Store(tmp_path).committed() == [1, 3]
    assert Store(tmp_path).leftovers() == []
    Store(tmp_path).verify(1)
    Store(tmp_path).verify(3)


def save_failing_late(rank: int, world: int, root: Path, place: str) -> sharded.SaveResult:
    """Rank 0 fails in a phase that only rank 0 has; its tensors are small enough to be written."""
    from megatron.core.dist_checkpointing import ShardedTensor

    store = Store(root)
    tensors = {"t": ShardedTensor.from_rank_offsets("t", torch.ones(8), (0, rank, world))}
    text = "x" * 50_000
    if place == "begin" and rank == 0:
        root.write_text("a file where the folder should be")
    if rank == 0 and place != "begin":
        limit_file_size(20_000)
    extra = {"text": text} if place == "common.json" else {}
    meta = {"text": text} if place == "manifest.json" else {}
    return sharded.save(store, 1, {**tensors, **extra}, meta, keep=1)


@pytest.mark.parametrize("place", ["begin", "common.json", "manifest.json"])
def test_failure_in_a_phase_of_rank_0_alone_reaches_all(tmp_path: Path, place: str) -> None:
    root = tmp_path / "store"
    ranks = run_distributed(save_failing_late, 2, root, place, timeout_s=20)
    assert ranks[0].error is not None and ranks[0].error.startswith("cannot save step 1: rank 0:")
    assert ranks[0].error == ranks[1].error
    assert Store(root).committed() == [] and Store(root).leftovers() == []


def save_unfit(rank: int, world: int, root: Path, change: Callable[[dict[str, Any]], None]) -> sharded.SaveResult:
    unfit = state(rank, world, 1)
    if rank == 1:
        change(unfit)
    return sharded.save(Store(root), 1, unfit, {}, keep=1)


def make_overlapping(unfit: dict[str, Any]) -> None:
    """Both ranks claim to be the one that stores the common tensor."""
    unfit["common"].replica_id = 0


def make_missing(unfit: dict[str, Any]) -> None:
    del unfit["split"]


def make_object(unfit: dict[str, Any]) -> None:
    from megatron.core.dist_checkpointing import ShardedObject

    unfit["object"] = ShardedObject("object", {"a": 1}, (1,), (0,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (make_overlapping, "rank 0: CheckpointingException: Invalid access pattern"),
        (make_missing, "rank 0: CheckpointingException: Invalid access pattern"),
        (make_object, "rank 1: object would be stored as a pickle"),
    ],
)
def test_state_that_does_not_fit_together_is_one_error_on_all(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    ranks = run_distributed(save_unfit, 2, tmp_path, change, timeout_s=20)
    assert ranks[0].error == ranks[1].error
    assert ranks[0].error is not None and message in ranks[0].error
    assert Store(tmp_path).committed() == []


def save_something_else(rank: int, world: int, root: Path) -> str | None:
    values = {**state(rank, world, 1), "plain": {"thing": object()}}
    return sharded.save(Store(root), 1, values, {}, keep=1).error


def test_values_that_are_no_plain_numbers_are_named(tmp_path: Path) -> None:
    errors = run_distributed(save_something_else, 2, tmp_path)
    assert errors[0] is not None and "the state.plain.thing is a object" in errors[0]


def load_changed(rank: int, world: int, root: Path, change: str, partial: bool = False) -> str | list[str]:
    from megatron.core.dist_checkpointing import ShardedTensor

    wanted = state(rank, world, -1)
    if change == "more" and rank == 1:
        wanted["extra"] = ShardedTensor.from_rank_offsets("extra", torch.ones(2))
    if change == "fewer":
        del wanted["common"]
    if change == "shape":
        wanted["common"] = ShardedTensor.from_rank_offsets("common", torch.ones(4), replica_id=rank)
    try:
        return sorted(sharded.load(Store(root), 1, wanted, partial=partial))
    except CheckpointError as error:
        return str(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("more", "step_00000001 has no extra, which the model needs"),
        ("fewer", "step_00000001 has common, for which the model has no place"),
        ("shape", r"common is (3,) in"),
    ],
)
def test_another_model_is_refused_in_one_sentence_on_all_ranks(tmp_path: Path, change: str, message: str) -> None:
    run_distributed(save_steps, 2, tmp_path, 1)
    first, second = run_distributed(load_changed, 2, tmp_path, change, timeout_s=20)
    assert first == second
    assert message in first and "\n" not in first


def test_a_part_can_be_loaded_alone_when_asked_for(tmp_path: Path) -> None:
    run_distributed(save_steps, 2, tmp_path, 1)
    assert run_distributed(load_changed, 2, tmp_path, "fewer", True) == [["plain", "split"]] * 2
    (error, _) = run_distributed(load_changed, 2, tmp_path, "more", True)
    assert "has no extra" in error


def test_a_missing_file_is_refused_in_one_sentence_on_all_ranks(tmp_path: Path) -> None:
    run_distributed(save_steps, 2, tmp_path, 1)
    (Store(tmp_path).folder(1) / "__1_0.distcp").unlink()
    first, second = run_distributed(load_changed, 2, tmp_path, "", timeout_s=20)
    assert first == second and "__1_0.distcp is missing" in first


def damage_shard(rank: int, world: int, root: Path) -> str:
    """The file has its size, so only the rank that reads it finds the damage."""
    path = Store(root).folder(1) / "__1_0.distcp"
    if rank == 0:
        path.write_bytes(bytes(path.stat().st_size))
    torch.distributed.barrier()
    result = load_changed(rank, world, root, "")
    assert isinstance(result, str)
    return result


def test_a_shard_that_one_rank_cannot_read_is_one_error_on_all(tmp_path: Path) -> None:
    run_distributed(save_steps, 2, tmp_path, 1)
    first, second = run_distributed(damage_shard, 2, tmp_path, timeout_s=20)
    assert first == second
    assert "a file of tensors is damaged and cannot be read (on rank 1)" in first


def test_an_index_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    run_distributed(save_steps, 2, tmp_path / "store", 1)
    store = Store(tmp_path / "store")

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {marker}",)

    index = store.folder(1) / ".metadata"
    index.write_bytes(pickle.dumps(Evil()))
    manifest_path = store.folder(1) / "manifest.json"
    manifest = json.loads(manifest_path.read_text())
    manifest["files"][".metadata"]["size"] = index.stat().st_size
    del manifest["sha256"]
    manifest_path.write_text(sealed(manifest))
    (error, _) = run_distributed(load_changed, 2, store.root, "", timeout_s=20)
    assert "asks for posix.system" in error
    assert not marker.exists()


def find_newest(rank: int, world: int, root: Path) -> tuple[int | None, list[str]]:
    warnings: list[str] = []
    return sharded.newest_valid(Store(root), warnings.append), warnings


def test_rank_0_finds_the_newest_valid_one_for_all(tmp_path: Path) -> None:
    run_distributed(save_steps, 2, tmp_path, 1, 2)
    os.truncate(Store(tmp_path).folder(2) / "__1_0.distcp", 10)
    (first, warnings), (second, silent) = run_distributed(find_newest, 2, tmp_path)
    assert (first, second) == (1, 1)
    assert len(warnings) == 1 and "__1_0.distcp has 10 bytes" in warnings[0]
    assert silent == []
