"""When a run is saved, what a checkpoint says of it, and what is told of each save."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import torch.distributed as dist

from titans_dist.checkpoint.saver import Saver, SaveResult
from titans_dist.checkpoint.store import Store
from titans_dist.config import CheckpointConfig, CheckpointError, Config, UserError
from titans_dist.parallel.peers import busy, own_versions
from titans_dist.tracking import Tracker

GUESSED_BYTES_PER_S = 200e6
"""Until the first save has been measured."""


class Saving:
    """The saver with its calendar: due steps, results, and how long a save takes."""

    def __init__(self, store: Store, settings: CheckpointConfig, timeout_s: float, size_bytes: int, last: int) -> None:
        """`size_bytes`: about the size of a checkpoint. `last`: the step that is saved already. Collective."""
        self.settings, self.last = settings, last
        self.saver = Saver(store, settings, timeout_s)
        self.longest_s = 1.0 + size_bytes / GUESSED_BYTES_PER_S / dist.get_world_size()
        """Seconds that the longest save took; a guess before the first."""
        self.failure: SaveResult | None = None
        """The newest save, where it has failed."""
        self._is_measured = False

    def is_due(self, step: int) -> bool:
        """Whether a step that has to be saved has been passed since the last save."""
        return self._passed(self.settings.interval, step) or self._is_permanent(step)

    def start(self, step: int, sharded_state: dict[str, Any], meta: dict[str, Any], copies: tuple[str, ...]) -> None:
        """Begin to save; none may be under way. What of the state begins with `copies` is not copied. Collective."""
        is_permanent, self.last = self._is_permanent(step), step
        self.saver.start(step, sharded_state, meta, permanent=is_permanent, private=copies)

    def report(self, tracker: Tracker | None) -> None:
        """Tell of a save that has ended since."""
        self._tell(self.saver.finished(), tracker)

    def wait(self, tracker: Tracker | None) -> None:
        """Until none is under way. Collective."""
        with busy("waiting for a save"):  # it may take longer than a hang is let
            result = self.saver.wait()
        self._tell(result, tracker)

    @property
    def trouble(self) -> int:
        """What ends the run on all ranks: 2 another start of it has taken over, 1 a failure with checkpoint.strict."""
        if self.failure is None:
            return 0
        return 2 if self.failure.is_fenced else int(self.settings.strict)

    def error(self, trouble: int) -> UserError:
        """What to raise for some rank's trouble; it may not have come to this rank yet."""
        why = self.failure.error if self.failure is not None else "a save has failed"
        if trouble == 2:
            return CheckpointError(f"{why}; this start of the run ends here, and nothing that was saved is lost")
        return UserError(
            f"{why}, and checkpoint.strict=true; the earlier checkpoints are sound: make room and start again"
        )

    def _tell(self, result: SaveResult | None, tracker: Tracker | None) -> None:
        if result is None:
            return
        self.failure = result if result.error is not None else None
        if result.error is None:
            seconds = result.seconds + result.stall_seconds
            self.longest_s = max(self.longest_s, seconds) if self._is_measured else seconds
            self._is_measured = True
        if tracker is None:
            return
        if result.error is not None:
            tracker.event("save_failed", step=result.step, attempts=result.attempts, error=result.error)
            return
        told: dict[str, Any] = {"seconds": round(result.seconds, 3), "stall": round(result.stall_seconds, 3)}
        told["bytes"] = result.bytes
        if result.attempts > 1:
            told["attempts"] = result.attempts
        tracker.event("checkpoint", step=result.step, **told)
        if result.prune_error is not None:
            tracker.event("prune_failed", step=result.step, error=result.prune_error)
        if result.mirror_error is not None:
            tracker.event("mirror_failed", step=result.step, error=result.mirror_error)

    def _is_permanent(self, step: int) -> bool:
        interval = self.settings.permanent_interval
        return interval is not None and self._passed(interval, step)

    def _passed(self, interval: int, step: int) -> bool:
        return step // interval > self.last // interval


def describe_job(config: Config, data_size: int) -> dict[str, Any]:
    """What a checkpoint says of the job that wrote it: processes, layout, engine, versions."""
    training, world = config.training, dist.get_world_size()
    return {
        "world": world,
        "engine": training.engine,
        "zero_stage": training.zero_stage if training.engine == "deepspeed" else None,
        "precision": training.precision,
        "layout": dataclasses.asdict(config.parallel) | {"data": data_size},
        "versions": own_versions(),
    }


def checkpoint_meta(
    config: Config, identity: dict[str, Any], job: dict[str, Any], step: int, loss: float, **states: Any
) -> dict[str, Any]:
    """The JSON part of a checkpoint; `states`: of the data, the health policy and wandb."""
    return {
        "identity": identity,
        **states,
        "tokens": step * config.training.global_batch_size * config.data.sequence_length,
        "loss": loss if math.isfinite(loss) else None,
        "job": job,
        "config": dataclasses.asdict(config),
        "time": round(time.time(), 3),
    }
