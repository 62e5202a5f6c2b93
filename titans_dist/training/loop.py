"""The training loop, from start or resume to the last checkpoint."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from titans_data import BatchSchedule, StreamSchedule, batches
from titans_dist.checkpoint.sharded import load, newest_valid, save
from titans_dist.checkpoint.store import Store
from titans_dist.config import Config, HealthError, Interrupted, UserError
from titans_dist.config.layout import describe_layout
from titans_dist.model import describe
from titans_dist.parallel.engines import build_engine
from titans_dist.parallel.processes import any_rank, processes
from titans_dist.parallel.stage import MicroBatch
from titans_dist.run.data import open_rows
from titans_dist.run.folder import write_config, write_status
from titans_dist.run.identity import check_identity, identity
from titans_dist.tracking import StepRow, Tracker, human
from titans_dist.training.signals import StopRequest


def train(config: Config) -> None:
    """Train until `training.steps`, from the newest valid checkpoint of the run folder or from the start.

    Runs in every process of the job (see `processes`). Raises Interrupted after a signal, once a checkpoint is
    saved; HealthError for a loss or gradient that is not finite; CheckpointError where the folder holds another run.
    """
    stop = StopRequest()
    with processes(config) as device:
        Training(config, device, stop).run()


class Training:
    """One start of one run."""

    def __init__(self, config: Config, device: torch.device, stop: StopRequest) -> None:
        self.config, self.device, self.stop = config, device, stop
        self.main = dist.get_rank() == 0
        self.engine = build_engine(config, device)
        self.rows = open_rows(config, "train")
        self.identity = identity(config, self.rows.source.fingerprint)
        self.store = Store(Path(config.run_dir) / "checkpoints")
        self.tracker: Tracker | None = None  # rank 0 alone speaks

    def run(self) -> None:
        """Resume, then one optimizer step after another."""
        training = self.config.training
        resumed, wandb_id = self._resume()
        done = resumed or 0
        if done >= training.steps:
            self._say(f"{self.config.run_dir} is done: {done} of {training.steps} steps")
            return
        self._start(resumed, wandb_id)
        order = StreamSchedule if training.carry_state else BatchSchedule
        schedule = order(len(self.rows), training.global_batch_size, self.config.data.seed)
        steps = batches(
            self.rows,
            schedule,
            done,
            self.engine.data_rank,
            self.engine.data_size,
            training.micro_batch_size,
            self.config.data.workers,
        )
        try:
            while done < training.steps:
                done = self._step(steps)
                # One rank's signal is everybody's: a save that some ranks do not join would hang.
                stopped = any_rank(bool(self.stop), self.device)
                ends = stopped or done == training.steps
                if ends or done % training.checkpoint_interval == 0:
                    is_saved = self._save(done)
                    if ends and not is_saved:
                        self._status("interrupted")
                        raise UserError(
                            f"stopped after step {done}, which could not be saved; the earlier checkpoints are sound: "
                            "make room and start again to go on from the newest"
                        )
                if stopped and done < training.steps:
                    self._status("interrupted")
                    raise Interrupted(f"stopped by {self.stop.signal or 'a signal'} after step {done}, which is saved")
            self._status("done")
        finally:
            if self.tracker is not None:
                self.tracker.close()

    def _step(self, steps: Iterator[tuple[int, list[MicroBatch]]]) -> int:
        """The next step with its metrics; returns the number of steps done."""
        started = time.perf_counter()
        index, micro_batches = next(steps)
        waited = time.perf_counter() - started
        done, interval = index + 1, self.config.tracking.memory_interval
        self.engine.observes = interval > 0 and done % interval == 0
        result = self.engine.step(micro_batches)
        seconds = time.perf_counter() - started
        tokens = self.config.training.global_batch_size * self.config.data.sequence_length
        if self.tracker is not None:
            self.tracker.step(
                StepRow(
                    step=done,
                    loss=result.loss,
                    grad_norm=result.grad_norm,
                    lr=result.lr,
                    tokens=done * tokens,
                    tokens_per_s=tokens / seconds,
                    step_time_s=seconds,
                    data_wait=waited / seconds,
                    memory_bytes=self._memory_bytes(),
                )
            )
            if result.memories:
                self.tracker.memories(done, result.memories)
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            raise HealthError(
                f"step {done} gave loss {result.loss} and gradient norm {result.grad_norm}: "
                f"{self.engine.culprit(micro_batches)}; the last checkpoint is sound: start again with a smaller "
                "optimizer.lr"
            )
        return done

    def _resume(self) -> tuple[int | None, str | None]:
        """Load the newest valid checkpoint, if there is one; returns its step and the id of its wandb run."""
        step = newest_valid(self.store, self._say)
        if step is None:
            return None, None
        meta = self.store.meta(step)
        check_identity(meta["identity"], self.identity, self.config.run_dir)
        self.engine.load(load(self.store, step, self.engine.sharded_state(is_loading=True)), step)
        return step, meta["wandb_id"]

    def _start(self, resumed: int | None, wandb_id: str | None) -> None:
        """Open the run folder and say what is about to be trained, on rank 0."""
        if not self.main:
            return
        config, parameters = self.config, sum(count for _, _, count, _ in describe(self.config.model))
        write_config(config)
        self._status("running")
        self._say(
            f"{Path(config.run_dir).name} | {human(parameters)} parameters | {dist.get_world_size()} processes = "
            f"{describe_layout(config.parallel, self.engine.data_size)} on {self.device.type} | "
            f"{human(self.rows.source.num_tokens)} tokens in rows of {config.data.sequence_length}"
        )
        self.tracker = Tracker(Path(config.run_dir), config, resumed_step=resumed, wandb_id=wandb_id)

    def _save(self, step: int) -> bool:
        """Save; whether there is a checkpoint of `step` now, the same on all ranks. A failure is an event."""
        meta = {"identity": self.identity, "wandb_id": self.tracker.wandb_id if self.tracker is not None else None}
        result = save(self.store, step, self.engine.sharded_state(), meta, keep=self.config.training.keep_checkpoints)
        if self.tracker is not None:
            if result.error is None:
                self.tracker.event("checkpoint", step=step, seconds=round(result.seconds, 3), bytes=result.bytes)
            else:
                self.tracker.event("save_failed", step=step, error=result.error)
        return result.bytes > 0

    def _memory_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _status(self, status: str) -> None:
        if self.main:
            write_status(self.config, status)

    def _say(self, line: str) -> None:
        if self.main:
            print(line, flush=True)
