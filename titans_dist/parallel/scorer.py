"""The parallel model for evaluation: no gradients, no optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from titans_dist.config import Config
from titans_dist.model import ModelState
from titans_dist.parallel.schedule import run_schedule
from titans_dist.parallel.stage import (
    MicroBatch,
    build_stages,
    in_precision,
    load_model,
    sharded_model,
    stage_inputs,
)


class Scorer:
    """Scores token sequences with the parallel model. Every method is collective: all ranks call it."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.device = device
        self.carries_state = config.training.carry_state
        self.stages = build_stages(config, device)
        self.modules = [in_precision(stage).eval() for stage in self.stages]
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.data_size = parallel_state.get_data_parallel_world_size()
        self._group = config.parallel.pipeline  # micro-batches at a time: interleaved stages take whole groups

    def sharded_state(self) -> dict[str, Any]:
        """The model as this rank's part of a sharded checkpoint."""
        return {"model": sharded_model(self.stages)}

    def load(self, loaded: dict[str, Any]) -> None:
        """Take over a loaded `sharded_state`."""
        load_model(self.stages, loaded["model"])

    @torch.no_grad()
    def total_loss(self, batches: Iterable[MicroBatch], poll: Callable[[], None] | None = None) -> tuple[float, int]:
        """Sum of the loss in nats, and number of tokens, over the rows of all ranks' micro-batches that are `valid`.

        All ranks must give the same number of micro-batches: `tokens` (b, T + 1), `starts` (b, T) if packed, and
        `valid` (b,). Where training carries its state, so does this, from each micro-batch to the next. `poll` is
        called between them and may raise, on all ranks at once.
        """
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        states: list[ModelState | None] = [None] * len(self.modules)

        def forward(
            batches: Iterator[tuple[int, MicroBatch]], module: nn.Module
        ) -> tuple[Tensor, Callable[[Tensor], Any]]:
            _, batch = next(batches)
            inputs, part = stage_inputs(batch, self.device), self.modules.index(module)
            if self.carries_state:
                state = states[part] or self.stages[part].model.initial_state(len(batch["valid"]))
                output, states[part] = module(*inputs, state)
            else:
                output = module(*inputs)

            def report(losses: Tensor) -> tuple[Tensor, Tensor]:
                losses = losses[batch["valid"].to(self.device)]
                one = torch.stack([losses.double().sum(), losses.new_tensor(losses.numel()).double()])
                return output.new_zeros(()), one  # the schedule's own loss is not used

            return output, report

        waiting = iter(batches)
        while group := list(islice(waiting, self._group)):
            if poll is not None:
                poll()
            real = len(group)
            group += [_without_rows(group[-1])] * (self._group - real)
            for one in run_schedule(self.modules, forward, group, forward_only=True):
                total += one
        dist.all_reduce(total)
        # Every tensor-parallel rank has counted the same rows.
        total /= parallel_state.get_tensor_model_parallel_world_size()
        return total[0].item(), round(total[1].item())


def _without_rows(batch: MicroBatch) -> MicroBatch:
    """A micro-batch that fills up a group and counts for nothing."""
    return {**batch, "valid": torch.zeros_like(batch["valid"])}
