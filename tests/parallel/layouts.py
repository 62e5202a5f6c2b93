"""A layout trained by real processes, beside one plain process without any of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.distributed import run_distributed
from titans_dist.config import Config, DataConfig, MemoryConfig, ModelConfig, ParallelConfig, TrainingConfig, validate
from titans_dist.config.layout import world_size
from titans_dist.model import build_model

STEPS, ROWS, LENGTH, LR = 5, 8, 32, 0.05
LR_OF_MAC = 0.005  # with more it leaves its start so fast that rounding grows a thousandfold in each step
SMALL = ModelConfig(
    num_layers=4,
    hidden_size=32,
    num_heads=4,
    vocab_size=64,
    window=6,
    segment_length=8,
    persistent_tokens=4,
    intermediate_size=32,
    memory=MemoryConfig(expansion=2, chunk_size=8),
)


def variant(name: str, **memory: Any) -> ModelConfig:
    return dataclasses.replace(SMALL, variant=name, memory={"chunk_size": 8, "expansion": 2, **memory})  # type: ignore[arg-type]


MODELS = {
    "lmm": variant("lmm"),
    "mac": variant("mac"),
    "mag": variant("mag"),
    "mal": variant("mal"),
    "moneta": variant("lmm", preset="moneta"),
    "yaad": variant("lmm", preset="yaad"),
    "memora": variant("lmm", preset="memora"),
    "gated_deltanet": variant("gated_deltanet"),
    "transformer": variant("transformer"),
}


def config(model: ModelConfig, micro_batch: int = 2, length: int = LENGTH, **parallel: Any) -> Config:
    made = Config(
        model=model,
        parallel=ParallelConfig(**parallel),
        data=DataConfig(format="synthetic", sequence_length=length),
        training=TrainingConfig(micro_batch_size=micro_batch, global_batch_size=ROWS, steps=STEPS),
    )
    validate(made)
    return made


def learning_rate(model: ModelConfig) -> float:
    return LR_OF_MAC if model.variant == "mac" else LR


def rows(step: int, length: int) -> Tensor:
    return torch.randint(0, SMALL.vocab_size, (ROWS, length + 1), generator=torch.Generator().manual_seed(step))


def document_starts(step: int, length: int) -> Tensor:
    starts = torch.rand(ROWS, length, generator=torch.Generator().manual_seed(100 + step)) < 0.1
    starts[:, 0] = True
    starts[0, 1:] = False
    return starts


@dataclasses.dataclass
class Curve:
    """Losses of all steps, and the gradients of the first by name of the parameter."""

    losses: list[float]
    gradients: dict[str, Tensor]


_curves: dict[str, Curve] = {}


def one_process(settings: Config, packed: bool) -> Curve:
    """Plain torch in float64, no megatron-core: the mean loss of all rows, and gradient descent."""
    length = settings.data.sequence_length
    key = f"{settings.model} {length} {packed}"
    if key in _curves:
        return _curves[key]
    model = build_model(settings.model, settings.training.seed).double()
    losses, gradients = [], {}
    for step in range(STEPS):
        x, starts = rows(step, length), document_starts(step, length) if packed else None
        loss = F.cross_entropy(model(x[:, :-1], starts=starts).flatten(0, 1), x[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        for name, value in model.named_parameters():
            assert value.grad is not None
            if step == 0:
                gradients[name] = value.grad.clone()
            with torch.no_grad():
                value -= learning_rate(settings.model) * value.grad
    _curves[key] = Curve(losses, gradients)
    return _curves[key]


def in_layout(rank: int, world: int, settings: Config, packed: bool) -> dict[str, Any]:
    """The same by the processes of a layout: megatron-core's schedule, buckets and finalizing, in float64."""
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from titans_dist.parallel import cpu, stage
    from titans_dist.parallel.pipeline import whole_name
    from titans_dist.parallel.processes import make_groups
    from titans_dist.parallel.schedule import loss_and_tokens, mean_loss, run_schedule

    def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
        """megatron-core's works in float32 whatever it is given."""
        whole = gather_from_tensor_model_parallel_region(logits)
        return F.cross_entropy(whole.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)

    cpu.install()
    make_groups(settings.parallel)
    stages = [made.double() for made in stage.build_stages(settings, torch.device("cpu"))]
    transformer = stages[0].config
    transformer.pipeline_dtype = torch.float64
    buckets = DistributedDataParallelConfig(overlap_grad_reduce=True)
    modules = [DistributedDataParallel(transformer, buckets, made) for made in stages]
    transformer.finalize_model_grads_func = finalize_model_grads
    transformer.no_sync_func = [m.no_sync for m in modules] if len(modules) > 1 else modules[0].no_sync

    def forward(batches: Iterator[Any], module: nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
        return module(*stage.stage_inputs(next(batches)[1], torch.device("cpu"))), loss_and_tokens

    data = (parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank())
    losses, gradients, length = [], {}, settings.data.sequence_length
    for step in range(STEPS):
        share = {"tokens": rows(step, length)} | ({"starts": document_starts(step, length)} if packed else {})
        own = {name: x.chunk(data[0])[data[1]] for name, x in share.items()}
        split = {name: x.split(settings.training.micro_batch_size) for name, x in own.items()}
        batches = [dict(zip(split, parts, strict=True)) for parts in zip(*split.values(), strict=True)]
        for module in modules:
            module.zero_grad_buffer()
        with mock.patch.object(stage, "vocab_parallel_cross_entropy", cross_entropy):
            losses.append(mean_loss(run_schedule(modules, forward, batches), torch.device("cpu")))
        for made in stages:
            for name, value in made.model.named_parameters():
                axis = value.partition_dim if value.tensor_model_parallel else None  # type: ignore[attr-defined]
                if step == 0:
                    gradients[whole_name(name, settings.model)] = (value.main_grad.clone(), axis)  # type: ignore[attr-defined]
                with torch.no_grad():
                    value -= learning_rate(settings.model) * value.main_grad  # type: ignore[attr-defined]
    return {
        "losses": losses,
        "gradients": gradients,
        "tensor_rank": parallel_state.get_tensor_model_parallel_rank(),
    }


def check_layout(settings: Config, packed: bool = False, tolerance: float = 1e-9) -> None:
    """All losses and all gradients, on every process, are those of one process."""
    wanted = one_process(settings, packed)
    ranks = run_distributed(in_layout, world_size(settings.parallel), settings, packed)
    seen: set[str] = set()
    for rank in ranks:
        for found, right in zip(rank["losses"], wanted.losses, strict=True):
            assert abs(found - right) <= tolerance * abs(right), (rank["losses"], wanted.losses)
        for name, (found, axis) in rank["gradients"].items():
            right = wanted.gradients[name]
            if axis is not None:
                right = right.chunk(settings.parallel.tensor, axis)[rank["tensor_rank"]]
            scale = wanted.gradients[name].abs().max()
            assert found.shape == right.shape, name
            assert (found - right).abs().max() <= tolerance * scale, (name, (found - right).abs().max() / scale)
        seen |= set(rank["gradients"])
    assert seen == set(wanted.gradients)
