"""A resumed training is the unbroken one: bit by bit on the same layout, within rounding on another."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.small_training import Layout, SmallTraining
from tests.distributed import run_distributed
from titans_dist.checkpoint import sharded
from titans_dist.checkpoint.store import Store
from titans_dist.checkpoint.tensors import Tensors
from titans_dist.parallel.cpu import cpu_device_mode
from titans_dist.parallel.optimizer_state import boxes_of_range

Parameters = dict[str, torch.Tensor]


def train_and_save(rank: int, world: int, root: Path, layout: Layout, steps: int, more: int) -> Parameters:
    """Train ``steps``, save, train ``more`` without a break."""
    training = SmallTraining(layout)
    training.train(1, steps)
    result = sharded.save(Store(root), steps, training.state(), {}, keep=1)
    assert result.error is None
    training.train(steps + 1, steps + more)
    return training.parameters()


def load_and_train(
    rank: int, world: int, root: Path, layout: Layout, steps: int, more: int, warm_up: int = 0
) -> tuple[Parameters, list[float], bool]:
    """Start from other weights, load, train ``more``; ``warm_up`` steps before the load leave state to overwrite."""
    training = SmallTraining(layout, seed=99)
    training.train(1, warm_up)
    training.take(sharded.load(Store(root), steps, training.state(is_loading=True)))
    tensors = training.adam_steps()
    loaded_steps = [float(step) for step in tensors]
    distinct = len({id(step) for step in tensors}) == len(tensors)
    training.train(steps + 1, steps + more)
    return training.parameters(), loaded_steps, distinct


def assert_equal_on_all_ranks(unbroken: list[Parameters], resumed: list[Any]) -> None:
    for expected, (found, _, _) in zip(unbroken, resumed, strict=True):
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        pytest.param(2, Layout(), id="DP2 DistributedOptimizer fp32"),
        pytest.param(2, Layout(bf16=True), id="DP2 DistributedOptimizer bf16"),
        pytest.param(2, Layout(distributed_optimizer=False), id="DP2 FP32Optimizer"),
        pytest.param(2, Layout(distributed_optimizer=False, bf16=True), id="DP2 Float16Optimizer bf16"),
        pytest.param(4, Layout(tensor_parallel=2), id="TP2 DP2 DistributedOptimizer fp32"),
        pytest.param(2, Layout(bucket_size=1), id="DP2 DistributedOptimizer, padded buckets"),
        pytest.param(4, Layout(width=4), id="DP4 DistributedOptimizer, two ranks with an empty shard"),
    ],
)
def test_resumed_training_is_bit_equal(tmp_path: Path, world: int, layout: Layout) -> None:
    unbroken = run_distributed(train_and_save, world, tmp_path, layout, 3, 3)
    resumed = run_distributed(load_and_train, world, tmp_path, layout, 3, 3)
    assert_equal_on_all_ranks(unbroken, resumed)
    # Adam's counter was restored, and each parameter has its own.
    assert all(set(steps) <= {3.0} and distinct for _, steps, distinct in resumed)
    assert resumed[0][1], "rank 0 has parameters"


@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_load_over_a_training_that_has_begun(tmp_path: Path, distributed_optimizer: bool) -> None:
    layout = Layout(distributed_optimizer=distributed_optimizer)
    unbroken = run_distributed(train_and_save, 2, tmp_path, layout, 3, 2)
    resumed = run_distributed(load_and_train, 2, tmp_path, layout, 3, 2, 4)
    assert_equal_on_all_ranks(unbroken, resumed)


@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_a_checkpoint_of_step_0_can_be_saved_and_loaded(tmp_path: Path, distributed_optimizer: bool) -> None:
    layout = Layout(distributed_optimizer=distributed_optimizer)
    unbroken = run_distributed(train_and_save, 2, tmp_path, layout, 0, 2)
    resumed = run_distributed(load_and_train, 2, tmp_path, layout, 0, 2)
    assert_equal_on_all_ranks(unbroken, resumed)


def never_saved(rank: int, world: int, layout: Layout, steps: int) -> Parameters:
    training = SmallTraining(layout)
    training.train(1, steps)
    return training.parameters()


def test_taking_the_state_leaves_the_training_as_it_was(tmp_path: Path) -> None:
    for steps in (0, 3):
        saved = run_distributed(train_and_save, 2, tmp_path / str(steps), Layout(), steps, 3)
        alone = run_distributed(never_saved, 2, Layout(), steps + 3)
        assert all(torch.equal(saved[0][name], value) for name, value in alone[0].items())


@pytest.mark.parametrize(("world", "new_world"), [(2, 1), (1, 2), (4, 2)])
def test_another_number_of_data_parallel_ranks_continues_the_same_training(
    tmp_path: Path, world: int, new_world: int
) -> None:
    saved = run_distributed(train_and_save, world, tmp_path, Layout(), 3, 0)
    ((at_once, _, _), *_) = run_distributed(load_and_train, new_world, tmp_path, Layout(), 3, 0)
    assert all(torch.equal(at_once[name], value) for name, value in saved[0].items())
    # One and two ranks see the same two batches per step, so from here on they are one training.
    reference = run_distributed(load_and_train, 2, tmp_path, Layout(), 3, 3)[0][0]
    for parameters, steps, _ in run_distributed(load_and_train, new_world, tmp_path, Layout(), 3, 3):
        assert set(steps) == {3.0}
        for name, value in reference.items():
            torch.testing.assert_close(parameters[name], value, rtol=1e-5, atol=1e-6)


def test_another_tensor_parallel_size_continues_the_same_training(tmp_path: Path) -> None:
    unbroken = run_distributed(train_and_save, 2, tmp_path, Layout(tensor_parallel=2), 3, 3)
    ((whole, _, _),) = run_distributed(load_and_train, 1, tmp_path, Layout(tensor_parallel=1), 3, 3)
    up, down = (next(name for name in whole if part in name) for part in ("up", "down"))
    torch.testing.assert_close(torch.cat([rank[up] for rank in unbroken], 0), whole[up], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat([rank[down] for rank in unbroken], 1), whole[down], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 1, 3), (2, 3, 2, 2)])
def test_a_range_of_a_flat_tensor_is_few_boxes_of_the_whole_one(shape: tuple[int, ...]) -> None:
    whole = torch.arange(math.prod(shape)).reshape(shape)
    for start in range(whole.numel()):
        for end in range(start + 1, whole.numel() + 1):
            boxes = boxes_of_range(start, end, shape)
            parts = [
                whole[tuple(slice(first, first + size) for first, size in zip(offset, box, strict=True))].flatten()
                for offset, box in boxes
            ]
            assert torch.equal(torch.cat(parts), whole.flatten()[start:end])
            assert len(boxes) <= max(1, 2 * len(shape) - 1)


def upstream_state(training: SmallTraining) -> dict[str, Any]:
    """megatron-core's own, which gathers everything on every rank; right where no bucket is padded."""
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    model = training.model.module.sharded_state_dict()
    with cpu_device_mode():
        return {"model": model, "optimizer": training.optimizer.sharded_state_dict(model, metadata=metadata)}


def save_both(rank: int, world: int, root: Path, layout: Layout) -> None:
    training = SmallTraining(layout)
    training.train(1, 3)
    for name, state in (("ours", training.state()), ("upstream", upstream_state(training))):
        assert sharded.save(Store(root / name), 3, state, {}, keep=1).error is None


@pytest.mark.parametrize(
    ("world", "layout"),
    [(2, Layout()), (2, Layout(bf16=True)), (4, Layout(tensor_parallel=2))],
    ids=["DP2", "DP2 bf16", "TP2 DP2"],
)
def test_a_checkpoint_holds_what_megatron_cores_own_format_holds(tmp_path: Path, world: int, layout: Layout) -> None:
    run_distributed(save_both, world, tmp_path, layout)
    ours, upstream = (Tensors(Store(tmp_path / name).folder(3)) for name in ("ours", "upstream"))
    assert ours.names == upstream.names
    assert any(name.startswith("optimizer.state.exp_avg_sq.") for name in ours.names)
    for name in ours.names:
        assert ours.dtype(name) == upstream.dtype(name)
        assert torch.equal(ours.read(name), upstream.read(name)), name


def save_upstream(rank: int, world: int, root: Path, layout: Layout) -> Parameters:
    training = SmallTraining(layout)
    training.train(1, 3)
    assert sharded.save(Store(root), 3, upstream_state(training), {}, keep=1).error is None
    training.train(4, 6)
    return training.parameters()


def test_a_checkpoint_in_megatron_cores_own_format_is_continued(tmp_path: Path) -> None:
    unbroken = run_distributed(save_upstream, 2, tmp_path, Layout())
    resumed = run_distributed(load_and_train, 2, tmp_path, Layout(), 3, 3)
    assert_equal_on_all_ranks(unbroken, resumed)


def written_and_held(rank: int, world: int) -> tuple[int, int]:
    """Elements of the optimizer's state that this rank writes, and that it has; exits where one is a copy."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica

    training = SmallTraining(Layout())
    training.train(1, 1)
    held = []
    for part in getattr(training.optimizer, "chained_optimizers", [training.optimizer]):
        for parameter, state in part.optimizer.state.items():
            held += [parameter, state["exp_avg"], state["exp_avg_sq"]]
    given = [x for x in nested_values(training.state()["optimizer"]) if isinstance(x, ShardedTensor)]
    memory = {x.untyped_storage().data_ptr() for x in held}
    assert all(x.data.untyped_storage().data_ptr() in memory for x in given)
    return sum(x.data.numel() for x in given if is_main_replica(x.replica_id)), sum(x.numel() for x in held)


def test_each_rank_writes_what_it_has_and_copies_nothing() -> None:
    shares = run_distributed(written_and_held, 2)
    assert all(written == held > 0 for written, held in shares)
