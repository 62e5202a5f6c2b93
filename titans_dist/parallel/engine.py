"""The training engine on megatron-core: its schedule, gradient buckets, distributed optimizer and learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import Tensor, nn

from titans_dist.config import Config
from titans_dist.layers.telemetry import Records, collect
from titans_dist.model import ModelState
from titans_dist.parallel.carried import CarriedState, carried_sharded_state, load_carried
from titans_dist.parallel.cpu import cpu_device_mode
from titans_dist.parallel.culprit import find_culprit
from titans_dist.parallel.learning_rate import learning_rate_schedule, step_learning_rate
from titans_dist.parallel.optimizer_state import load_optimizer_state, optimizer_sharded_state
from titans_dist.parallel.results import Judge, Poll, StepAbandoned, StepResult, first_memories, is_finite
from titans_dist.parallel.rng import load_rng, rng_sharded_state
from titans_dist.parallel.schedule import is_first_pipeline, loss_and_tokens, mean_loss, run_schedule
from titans_dist.parallel.stage import (
    MicroBatch,
    build_stages,
    in_precision,
    load_model,
    sharded_model,
    stage_inputs,
)


class Engine:
    """The parallel model with its optimizer. Every method is collective: all ranks call it."""

    copies: tuple[str, ...] = ()
    """Of what `sharded_state` gives, the beginnings of the keys of tensors that are copies; the others are live."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.device = device
        self.stages = build_stages(config, device)
        transformer = self.stages[0].config
        settings = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            # Overlap waits for every parameter's gradient; where no document begins, what it begins with has none.
            overlap_grad_reduce=not config.training.carry_state,
        )
        self.modules = [DistributedDataParallel(transformer, settings, in_precision(stage)) for stage in self.stages]
        transformer.finalize_model_grads_func = finalize_model_grads
        transformer.no_sync_func = [module.no_sync for module in self.modules]
        if len(self.modules) == 1:
            transformer.no_sync_func = self.modules[0].no_sync
        with cpu_device_mode():
            self.optimizer = get_megatron_optimizer(
                _optimizer_config(config),
                self.modules,
                config_overrides={ParamKey(attr="no_decay"): ParamGroupOverride(wd_mult=0.0)},
            )
        # Built before the first step: weight decay exclusions act only through it.
        self.scheduler = learning_rate_schedule(config, self.optimizer)
        self.observes = False
        """Whether the next step looks into the memories, as far as they are those of rank 0's pipeline."""
        self.lr_scale = 1.0
        """What the schedule's learning rate is multiplied by."""
        self._records: list[Records | None] = [None] * len(self.modules)
        self._poll: Poll | None = None
        self.carried = [CarriedState(config, s.model) for s in self.stages] if config.training.carry_state else None

    @property
    def data_rank(self) -> int:
        """Which share of the batch this rank reads."""
        return parallel_state.get_data_parallel_rank()

    @property
    def data_size(self) -> int:
        """Into how many shares the batch is split."""
        return parallel_state.get_data_parallel_world_size()

    def step(self, batches: list[MicroBatch], judge: Judge = is_finite, poll: Poll | None = None) -> StepResult:
        """One optimizer step on this rank's micro-batches, each `tokens` (b, T + 1) and, if packed, `starts` (b, T).

        `judge` decides whether the update is made. Without a pipeline, `poll` is called before each micro-batch;
        StepAbandoned goes through, with nothing changed.
        """
        for module in self.modules:
            module.zero_grad_buffer()
        self.optimizer.zero_grad()
        carried = [state.kept() for state in self.carried or []]
        try:
            self._poll = poll
            losses = self._run(batches)
        except StepAbandoned:
            self._restore(carried)
            raise
        finally:
            self._poll = None
        step_learning_rate(self.scheduler, self.lr_scale)
        loss, grad_norm = mean_loss(losses, self.device), self._grad_norm()
        is_applied = judge(loss, grad_norm)
        if is_applied:
            self._update(grad_norm)
        else:
            self._restore(carried)
        lr = next(group["lr"] for group in self.optimizer.param_groups)
        return StepResult(loss, grad_norm, float(lr), is_applied, self._memories() if self.observes else None)

    def culprit(self, batches: list[MicroBatch]) -> str:
        """What was the first thing not finite in the last step, which was on `batches` and so changed nothing."""
        carried = [state.kept() for state in self.carried or []]
        found = find_culprit([stage.model for stage in self.stages], lambda: self._run(batches, forward_only=True))
        self._restore(carried)
        return found

    def _restore(self, carried: list[list[ModelState]]) -> None:
        for state, kept in zip(self.carried or [], carried, strict=True):
            state.restore(kept)

    def _run(self, batches: list[MicroBatch], forward_only: bool = False) -> list[Tensor]:
        """The schedule: each micro-batch's mean loss where the last part of the model is, else nothing."""
        return run_schedule(self.modules, self._forward, batches, forward_only)

    def _memories(self) -> dict[str, dict[str, Any]] | None:
        records, self._records = self._records, [None] * len(self.modules)
        return first_memories(self.stages, records)

    def _grad_norm(self) -> float:
        with cpu_device_mode():
            self.optimizer.prepare_grads()
            return float(self.optimizer.get_grad_norm())

    def _update(self, grad_norm: float) -> None:
        with cpu_device_mode():
            for part in self.optimizer.chained_optimizers:
                if part.config.clip_grad > 0:
                    clip_grad_by_total_norm_fp32(part.get_parameters(), part.config.clip_grad, grad_norm)
            self.optimizer.step_with_ready_grads()

    def _forward(
        self, batches: Iterator[tuple[int, MicroBatch]], module: nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], Any]]:
        number, batch = next(batches)
        if self._poll is not None and parallel_state.get_pipeline_model_parallel_world_size() == 1:
            self._poll(number)
        part = self.modules.index(module)
        inputs = stage_inputs(batch, self.device)
        with collect() if self.observes and number == 0 and is_first_pipeline() else nullcontext() as records:
            if self.carried is None:
                output = module(*inputs)
            else:
                output, self.carried[part][number] = module(*inputs, self.carried[part][number])
        self._records[part] = self._records[part] or records
        return output, loss_and_tokens

    def sharded_state(self, is_loading: bool = False) -> dict[str, Any]:
        """Model, optimizer and carried state as this rank's part of a sharded checkpoint."""
        model = sharded_model(self.stages)
        optimizer = optimizer_sharded_state(self.optimizer, model, is_loading)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer, "rng": rng_sharded_state()}
        if self.carried is not None:
            state["carried"] = carried_sharded_state(self.carried)
        return state

    def load(self, loaded: dict[str, Any], step: int) -> None:
        """Continue after `step` from a loaded `sharded_state`."""
        load_model(self.stages, loaded["model"])
        load_rng(loaded["rng"])
        if self.carried is not None:
            load_carried(self.carried, loaded["carried"])
        # The checkpoint's groups bring their settings along; those of this start's configuration count.
        kept = ("max_lr", "min_lr", "betas", "eps")
        settings = [{key: group[key] for key in kept} for group in self.optimizer.param_groups]
        load_optimizer_state(self.optimizer, loaded["optimizer"])
        for group, values in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(values)
        self.scheduler.num_steps = step


def _optimizer_config(config: Config) -> OptimizerConfig:
    optimizer, bf16 = config.optimizer, config.training.precision == "bfloat16"
    return OptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.lr * optimizer.min_lr_ratio,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.eps,
        clip_grad=optimizer.clip_grad,
        use_distributed_optimizer=True,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
    )
