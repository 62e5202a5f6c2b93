"""What a training engine reports of a step, whichever engine it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from titans_dist.layers.telemetry import Records
from titans_dist.parallel.schedule import is_first_pipeline
from titans_dist.parallel.stage import Stage

Judge = Callable[[float, float], bool]
"""(mean loss, gradient norm) -> whether the update is to be made; the same on every rank."""
Poll = Callable[[int], None]
"""Called before each micro-batch with its number; collective. It may raise StepAbandoned, on all ranks at once."""


class StepAbandoned(Exception):
    """A step was left between two micro-batches: nothing of it was taken over."""


def is_finite(loss: float, grad_norm: float) -> bool:
    """The least that an update must be."""
    return math.isfinite(loss) and math.isfinite(grad_norm)


@dataclass
class StepResult:
    """What one optimizer step gave, the same on every rank: mean loss in nats, gradient norm, learning rate used."""

    loss: float
    grad_norm: float
    lr: float
    is_applied: bool
    """Whether the update was made. If not, parameters, moments and carried state are those from before the step."""
    memories: dict[str, dict[str, Any]] | None = None
    """How this rank's part of each memory was doing in the first micro-batch, where that was asked for."""


def first_memories(stages: list[Stage], records: list[Records | None]) -> dict[str, dict[str, Any]] | None:
    """What the pipeline of rank 0 has seen of its memories, on rank 0."""
    found: dict[str, dict[str, Any]] = {}
    for stage, seen in zip(stages, records, strict=True):
        if seen is not None:
            found |= seen.summary(stage.model)
    if not is_first_pipeline():
        return None
    group = parallel_state.get_pipeline_model_parallel_group()
    everybody: list[Any] = [None] * group.size()
    dist.all_gather_object(everybody, found, group=group)
    memories = {path: numbers for one in everybody for path, numbers in one.items()}
    return dict(sorted(memories.items(), key=lambda item: _block(item[0]))) or None


def _block(path: str) -> list[tuple[int, str]]:
    """What sorts paths by the number of their block."""
    return [(int(part) if part.isdigit() else 0, part) for part in path.split(".")]
