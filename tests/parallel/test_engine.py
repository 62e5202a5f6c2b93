"""Every layout trains like one plain process: torch AdamW on the whole model, no megatron-core.

Float32 here, as the engine runs it; test_tensor.py compares the gradients in float64, to the last digits.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.distributed import run_distributed
from titans_dist.config import Config, MemoryConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from titans_dist.model import build_model

STEPS, BATCH, LENGTH = 5, 8, 24
CONFIG = Config(
    model=ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_heads=4,
        vocab_size=64,
        window=6,
        persistent_tokens=4,
        memory=MemoryConfig(expansion=2, chunk_size=8),
    ),
    training=TrainingConfig(steps=STEPS, micro_batch_size=2, global_batch_size=BATCH),
    # With a small epsilon Adam's first steps are the gradient's sign, which turns rounding into whole steps.
    optimizer=OptimizerConfig(lr=5e-3, warmup_steps=2, clip_grad=0.5, eps=1e-2),
)


def rows(step: int) -> Tensor:
    return torch.randint(0, 64, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))


def learning_rate(step: int, config: Config = CONFIG) -> float:
    """Linear warm-up, then cosine to a tenth; `step` counts from 1."""
    peak, warmup = config.optimizer.lr, config.optimizer.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    share = (step - warmup) / (STEPS - warmup)
    return 0.1 * peak + 0.9 * peak * 0.5 * (1 + math.cos(math.pi * share))


def one_process(config: Config = CONFIG) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """(loss, gradient norm) of every step, and the parameters after the last."""
    model = build_model(config.model, config.training.seed)
    decay, rest = [], []
    for name, value in model.named_parameters():
        matrix = value.dim() >= 2 and not any(part in name for part in ("norm", "gain", "bias", "tokens", "conv"))
        (decay if matrix else rest).append(value)
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.95), eps=1e-2
    )
    history = []
    for step in range(STEPS):
        x = rows(step)
        loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_grad or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step + 1, config)
        optimizer.step()
        history.append((loss.item(), norm.item()))
    return history, {name: value.detach() for name, value in model.named_parameters()}


def train_rank(rank: int, world: int, config: Config) -> tuple[Any, ...]:
    from megatron.core import parallel_state

    from titans_dist.parallel import cpu
    from titans_dist.parallel.engine import Engine
    from titans_dist.parallel.pipeline import whole_name
    from titans_dist.parallel.processes import make_groups

    cpu.install()
    make_groups(config.parallel)
    engine = Engine(config, torch.device("cpu"))
    history = []
    for step in range(STEPS):
        share = rows(step).chunk(engine.data_size)[engine.data_rank]
        result = engine.step([{"tokens": part} for part in share.split(config.training.micro_batch_size)])
        history.append((result.loss, result.grad_norm))
        assert result.lr == pytest.approx(learning_rate(step + 1))
    parts = {
        whole_name(name, config.model): (
            value.detach(),
            value.partition_dim if value.tensor_model_parallel else None,  # type: ignore[attr-defined]
        )
        for name, value in engine.stages[0].model.named_parameters()
    }
    return history, parts, parallel_state.get_tensor_model_parallel_rank()


LAYOUTS = {
    "one": (1, ParallelConfig()),
    "tp2_sp": (2, ParallelConfig(tensor=2)),
    "tp2": (2, ParallelConfig(tensor=2, sequence=False)),
    "dp2": (2, ParallelConfig()),
    "tp2_sp_dp2": (4, ParallelConfig(tensor=2)),
    "tp4_sp": (4, ParallelConfig(tensor=4)),
    "tp4": (4, ParallelConfig(tensor=4, sequence=False)),
    "pp2": (2, ParallelConfig(pipeline=2)),
    "pp2_dp2": (4, ParallelConfig(pipeline=2)),
    "cp3_ring": (3, ParallelConfig(context=3, context_mode="ring")),
    "pp2_cp3": (6, ParallelConfig(pipeline=2, context=3)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_norms_and_parameters_equal_one_process(layout: str) -> None:
    world, parallel = LAYOUTS[layout]
    wanted_history, wanted = one_process()
    ranks = run_distributed(train_rank, world, dataclasses.replace(CONFIG, parallel=parallel))
    seen: set[str] = set()
    for history, parts, tensor_rank in ranks:
        for (loss, norm), (wanted_loss, wanted_norm) in zip(history, wanted_history, strict=True):
            assert loss == pytest.approx(wanted_loss, rel=2e-6)
            assert norm == pytest.approx(wanted_norm, rel=1e-4)
        for name, (value, axis) in parts.items():
            whole = wanted[name]
            expected = whole if axis is None else whole.chunk(parallel.tensor, axis)[tensor_rank]
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        seen |= set(parts)
    assert seen == set(wanted)


def test_bfloat16_follows_float32_roughly() -> None:
    wanted, _ = one_process()
    config = dataclasses.replace(
        CONFIG, parallel=ParallelConfig(tensor=2), training=dataclasses.replace(CONFIG.training, precision="bfloat16")
    )
    for history, parts, _ in run_distributed(train_rank, 2, config):
        assert all(value.dtype == torch.bfloat16 for value, _ in parts.values())
        assert [loss for loss, _ in history] == pytest.approx([loss for loss, _ in wanted], rel=1e-2)


def test_a_run_shorter_than_its_warm_up_is_the_start_of_the_long_one() -> None:
    def rates(rank: int, world: int) -> list[float]:
        from megatron.core import parallel_state

        from titans_dist.parallel import cpu
        from titans_dist.parallel.engine import Engine

        cpu.install()
        parallel_state.initialize_model_parallel(1)
        settings = dataclasses.replace(CONFIG.optimizer, warmup_steps=20)
        config = dataclasses.replace(CONFIG, optimizer=settings, training=TrainingConfig(steps=2))
        engine = Engine(config, torch.device("cpu"))
        return [engine.step([{"tokens": rows(step)}]).lr for step in range(2)]

    assert run_distributed(rates, 1)[0] == pytest.approx([CONFIG.optimizer.lr / 20, CONFIG.optimizer.lr / 10])
