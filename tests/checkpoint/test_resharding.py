"""A checkpoint of tensor-parallel weights fits every tensor-parallel size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoint.small_training import Layout, SmallTraining
from tests.distributed import run_distributed
from titans_dist.checkpoint import sharded
from titans_dist.checkpoint.store import Store


def save_model(rank: int, world: int, root: Path, tensor_parallel: int) -> None:
    model = SmallTraining(Layout(tensor_parallel=tensor_parallel)).model.module
    assert sharded.save(Store(root), 1, model.sharded_state_dict(), {}, keep=1).error is None


def load_model(rank: int, world: int, root: Path, tensor_parallel: int) -> tuple[torch.Tensor, torch.Tensor]:
    model = SmallTraining(Layout(tensor_parallel=tensor_parallel), seed=99).model.module
    model.load_state_dict(sharded.load(Store(root), 1, model.sharded_state_dict()))
    return model.up.weight.detach(), model.down.weight.detach()


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 2)])
def test_column_and_row_parallel_weights_move_to_another_tensor_parallel_size(
    tmp_path: Path, before: int, after: int
) -> None:
    run_distributed(save_model, before, tmp_path / "store", before)
    shards = run_distributed(load_model, after, tmp_path / "store", after)
    ((up, down),) = run_distributed(expected_weights, 1)
    assert torch.equal(torch.cat([shard[0] for shard in shards], 0), up)
    assert torch.equal(torch.cat([shard[1] for shard in shards], 1), down)


def expected_weights(rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    model = SmallTraining(Layout()).model.module
    return model.up.weight.detach(), model.down.weight.detach()
