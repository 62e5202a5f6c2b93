"""Micro-batches through this rank's parts of the model, by megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from titans_dist.parallel.stage import MicroBatch

Forward = Callable[[Iterator[tuple[int, MicroBatch]], nn.Module], tuple[Tensor, Callable[[Tensor], Any]]]
"""(numbered micro-batches, one part of the model) -> (its output, what makes a loss of the last part's output)."""


def run_schedule(
    modules: Sequence[nn.Module], forward: Forward, batches: list[MicroBatch], forward_only: bool = False
) -> list[Any]:
    """What the loss function reports of each micro-batch, on ranks that have the last part; else an empty list.

    Forward and, unless `forward_only`, backward: one micro-batch after the other, 1F1B or interleaved.
    """
    rows, length = batches[0]["tokens"].shape
    iterators = [iter(enumerate(batches)) for _ in modules]
    is_one = len(modules) == 1
    reported: list[Any] = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iterators[0] if is_one else iterators,
        model=modules[0] if is_one else list(modules),
        num_microbatches=len(batches),
        seq_length=length - 1,  # of whole sequences: the schedules divide it by the context and tensor sizes
        micro_batch_size=rows,
        forward_only=forward_only,
    )
    return reported


def loss_and_tokens(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the losses, their number, and the mean to report.

    Of the two forms that the schedules take, the other one, a mean alone, is multiplied by the context-parallel size.
    They divide the first value in place.
    """
    total = losses.sum()
    count = torch.tensor(losses.numel(), dtype=torch.int, device=losses.device)
    return total, count, total.detach() / losses.numel()


def mean_loss(losses: list[Tensor], device: torch.device) -> float:
    """The mean over all ranks' micro-batches, on every rank; of pipelines the last stages alone have losses."""
    total = torch.zeros(2, dtype=torch.float64, device=device)
    if losses:
        total += torch.stack([torch.stack(losses).double().mean(), total.new_ones(())])
    dist.all_reduce(total)
    return float(total[0] / total[1])


def is_first_pipeline() -> bool:
    """Whether this rank belongs to the pipeline that rank 0 is in."""
    return bool(parallel_state.get_pipeline_model_parallel_first_rank() == 0)
