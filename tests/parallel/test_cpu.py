"""megatron-core on CPU processes: the adapter gives one process's numbers, and independent random streams."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.distributed import RankError, run_distributed
from titans_dist.parallel import cpu

HIDDEN, INNER, SEQUENCE, BATCH, STEPS = 8, 16, 4, 2, 3


def full_weights() -> dict[str, torch.Tensor]:
    """``up`` (INNER, HIDDEN) and ``down`` (HIDDEN, INNER), the same on every rank."""
    generator = torch.Generator().manual_seed(5)
    return {
        "up": torch.randn(INNER, HIDDEN, generator=generator) * 0.3,
        "down": torch.randn(HIDDEN, INNER, generator=generator) * 0.3,
    }


def batch(step: int, data_rank: int) -> torch.Tensor:
    """(SEQUENCE, BATCH, HIDDEN)"""
    return torch.randn(SEQUENCE, BATCH, HIDDEN, generator=torch.Generator().manual_seed(100 * step + data_rank))


def one_process(data_ranks: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    weights = {name: torch.nn.Parameter(value) for name, value in full_weights().items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.01)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for data_rank in range(data_ranks):
            inner = F.silu(F.linear(batch(step, data_rank), weights["up"]))
            (F.linear(inner, weights["down"]).pow(2).mean() / data_ranks).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(weights.values(), 0.5).item())
        optimizer.step()
    return {name: weight.detach() for name, weight in weights.items()}, norms


def train_in_parallel(rank: int, world: int, tensor_parallel: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Returns this rank's shards after STEPS steps of DDP + DistributedOptimizer, and the gradient norms."""
    cpu.install()
    from megatron.core import parallel_state as ps
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.transformer_config import TransformerConfig

    ps.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel)
    tensor_rank, data_rank = ps.get_tensor_model_parallel_rank(), ps.get_data_parallel_rank()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        tensor_model_parallel_size=tensor_parallel,
        sequence_parallel=tensor_parallel > 1,
        use_cpu_initialization=True,
    )

    class Pair(MegatronModule):
        def __init__(self) -> None:
            super().__init__(config)
            options: dict[str, Any] = {"config": config, "init_method": torch.nn.init.zeros_, "bias": False}
            self.up = ColumnParallelLinear(HIDDEN, INNER, **options)
            self.down = RowParallelLinear(INNER, HIDDEN, input_is_parallel=True, skip_bias_add=False, **options)
            with torch.no_grad():
                self.up.weight.copy_(full_weights()["up"].chunk(tensor_parallel, 0)[tensor_rank])
                self.down.weight.copy_(full_weights()["down"].chunk(tensor_parallel, 1)[tensor_rank])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(F.silu(self.up(x)[0]))[0]

    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True)
    model = DistributedDataParallel(config, ddp_config, Pair())
    settings = OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.01,
        clip_grad=0.5,
        use_distributed_optimizer=True,
    )
    with cpu.cpu_device_mode():
        optimizer = get_megatron_optimizer(settings, [model])
    norms = []
    for step in range(STEPS):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        x = batch(step, data_rank)
        if tensor_parallel > 1:  # sequence parallelism: each tensor-parallel rank holds a slice of the sequence
            local = x.chunk(tensor_parallel, 0)[tensor_rank]
            loss = model(local).pow(2).sum() / x.numel()
        else:
            loss = model(x).pow(2).mean()
        loss.backward()
        finalize_model_grads([model], None)
        with cpu.cpu_device_mode():
            _, norm, _ = optimizer.step()
        norms.append(float(norm))
    return {"up": model.module.up.weight.detach(), "down": model.module.down.weight.detach()}, norms


@pytest.mark.parametrize(("world", "tensor_parallel"), [(2, 2), (2, 1), (4, 2)])
def test_ddp_and_distributed_optimizer_equal_one_process(world: int, tensor_parallel: int) -> None:
    ranks = run_distributed(train_in_parallel, world, tensor_parallel)
    expected, norms = one_process(data_ranks=world // tensor_parallel)
    for rank, (shards, rank_norms) in enumerate(ranks):
        tensor_rank = rank % tensor_parallel
        torch.testing.assert_close(shards["up"], expected["up"].chunk(tensor_parallel, 0)[tensor_rank])
        torch.testing.assert_close(shards["down"], expected["down"].chunk(tensor_parallel, 1)[tensor_rank])
        assert rank_norms == pytest.approx(norms, rel=1e-5)


def draw(rank: int, world: int) -> tuple[float, float, float]:
    cpu.install()
    from megatron.core import parallel_state as ps
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    ps.initialize_model_parallel(tensor_model_parallel_size=world)
    model_parallel_cuda_manual_seed(1234)
    before = torch.rand(1).item()
    with get_cuda_rng_tracker().fork():
        forked = torch.rand(1).item()
    return before, forked, torch.rand(1).item()


def test_rng_tracker_forks_a_stream_per_tensor_parallel_rank_and_restores_the_common_one() -> None:
    (before_0, forked_0, after_0), (before_1, forked_1, after_1) = run_distributed(draw, 2)
    assert forked_0 != forked_1
    assert (before_0, after_0) == (before_1, after_1)
    torch.manual_seed(1234)
    assert [before_0, after_0] == torch.rand(2).tolist()  # the fork took nothing from the common stream


def recompute(rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    cpu.install()
    from megatron.core import parallel_state as ps
    from megatron.core.tensor_parallel import checkpoint, model_parallel_cuda_manual_seed

    ps.initialize_model_parallel(tensor_model_parallel_size=world)
    gradients = []
    for recomputed in (False, True):
        model_parallel_cuda_manual_seed(7)
        x = torch.linspace(-1, 1, 64, requires_grad=True)
        y = checkpoint(F.dropout, False, x) if recomputed else F.dropout(x)
        y.pow(2).sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    return gradients[0], gradients[1]


def test_activation_recomputation_draws_the_same_dropout_again() -> None:
    for plain, recomputed in run_distributed(recompute, 2):
        assert 0 < int((plain == 0).sum()) < plain.numel()
        assert torch.equal(plain, recomputed)


def use_the_mode(rank: int, world: int) -> None:
    x = torch.ones(2)
    with cpu.cpu_device_mode():
        assert torch.zeros(1, device="cuda").device.type == "cpu"
        assert torch.empty_like(x, device=torch.device("cuda", 0)).device.type == "cpu"
        assert x.cuda() is x
        assert x.to("cuda").device.type == "cpu"
        assert x.type() == "torch.cuda.FloatTensor"
        assert x.bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert x.type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


def test_mode_maps_cuda_to_cpu_and_ends_with_its_context() -> None:
    run_distributed(use_the_mode, 1)


def install_twice(rank: int, world: int) -> bool:
    cpu.install()
    first = torch.cuda.current_device
    cpu.install()
    return first is torch.cuda.current_device and torch.zeros(1, device=torch.cuda.current_device()).is_cpu


def test_install_is_idempotent_and_leaves_the_parent_process_alone() -> None:
    original = torch.cuda.current_device
    assert run_distributed(install_twice, 1) == [True]
    assert torch.cuda.current_device is original


def fail_on_one(rank: int, world: int) -> None:
    if rank == 1:
        raise ValueError("shape (3,) does not fit")
    torch.distributed.barrier()


def hang_on_one(rank: int, world: int) -> None:
    if rank == 0:
        time.sleep(60)


def die_on_one(rank: int, world: int) -> None:
    if rank == 1:
        import os

        os._exit(9)
    torch.distributed.barrier()


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (fail_on_one, r"(?s)rank 1 of 2 failed:.*shape \(3,\) does not fit"),
        (hang_on_one, r"(?s)rank\(s\) 0 of 2 did not finish in 2 s.*hang_on_one"),
        (die_on_one, "rank 1 of 2 died with exit code 9"),
    ],
)
def test_harness_names_the_rank_that_failed_hung_or_died(fn: Any, message: str) -> None:
    with pytest.raises(RankError, match=message):
        run_distributed(fn, 2, timeout_s=2 if fn is hang_on_one else 20)


def test_harness_works_after_a_backward_in_the_parent() -> None:
    torch.ones(4, requires_grad=True).sum().backward()
    ranks = run_distributed(recompute, 2)
    assert len(ranks) == 2


def tiny_numbers(rank: int, world: int, shape: tuple[int, int]) -> tuple[float, float]:
    """The sum of products of numbers of 1e-39, before and after."""
    x = torch.full(shape, 1e-39)
    before = (x @ torch.ones(shape[1], 2)).sum().item()
    cpu.install()
    return before, (torch.full(shape, 1e-39) * 2).sum().item()


def test_numbers_too_small_to_be_normal_are_zero() -> None:
    ((before, after),) = run_distributed(tiny_numbers, 1, (4, 4))
    assert after == 0.0 < before
