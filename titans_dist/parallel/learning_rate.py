"""The learning rate and the weight decay of every step: megatron-core's schedule, for any optimizer's groups."""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from titans_dist.config import Config


def learning_rate_schedule(config: Config, optimizer: Any) -> OptimizerParamScheduler:
    """Linear warm-up, then cosine. Stepped before each optimizer step, so that the first one already learns.

    It sets `lr` and `weight_decay` of `optimizer.param_groups`; a group's `wd_mult` of 0 keeps it from decay.
    """
    settings = config.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.lr * settings.min_lr_ratio,
        lr_warmup_steps=settings.warmup_steps,
        # A run that ends inside its warm-up is a short trial of the long one, and legal.
        lr_decay_steps=max(config.training.steps, settings.warmup_steps + 1),
        lr_decay_style="cosine",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=config.training.steps,
        wd_incr_style="constant",
    )


def step_learning_rate(scheduler: OptimizerParamScheduler, scale: float) -> None:
    """Set the groups to their values for the next step, the learning rate multiplied by `scale`."""
    scheduler.step(increment=1)
    for group in scheduler.optimizer.param_groups:
        group["lr"] *= scale
