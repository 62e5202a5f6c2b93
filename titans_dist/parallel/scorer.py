"""The parallel model for evaluation: no gradients, no optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from titans_dist.config import Config
from titans_dist.model import ModelState
from titans_dist.parallel.stage import MicroBatch, build_stage, stage_inputs


class Scorer:
    """Scores token sequences with the parallel model. Every method is collective: all ranks call it."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.device = device
        self.carries_state = config.training.carry_state
        self.stage, self.module = build_stage(config, device)
        self.module.eval()
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.data_size = parallel_state.get_data_parallel_world_size()

    def sharded_state(self) -> dict[str, Any]:
        """The model as this rank's part of a sharded checkpoint."""
        return {"model": self.stage.sharded_state_dict()}

    def load(self, loaded: dict[str, Any]) -> None:
        """Take over a loaded `sharded_state`."""
        self.stage.load_parameters(loaded["model"])

    @torch.no_grad()
    def total_loss(self, batches: Iterable[MicroBatch]) -> tuple[float, int]:
        """Sum of the loss in nats, and number of tokens, over the rows of all ranks' micro-batches that are `valid`.

        All ranks must give the same number of micro-batches: `tokens` (b, T + 1), `starts` (b, T) if packed, and
        `valid` (b,). Where training carries its state, so does this, from each micro-batch to the next.
        """
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        state: ModelState | None = None
        for batch in batches:
            valid = batch["valid"].to(self.device)
            if self.carries_state:
                state = state or self.stage.model.initial_state(len(valid))
                losses, state = self.module(*stage_inputs(batch, self.device), state)
            else:
                losses = self.module(*stage_inputs(batch, self.device))
            losses = losses[valid]
            total += torch.stack([losses.double().sum(), losses.new_tensor(losses.numel()).double()])
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        return total[0].item(), round(total[1].item())
