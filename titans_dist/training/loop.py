"""The training loop, from start or resume to the last checkpoint."""

from __future__ import annotations

import math
import os
import resource
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from titans_data import batches
from titans_dist.checkpoint.lease import Lease
from titans_dist.checkpoint.mirror import restore
from titans_dist.checkpoint.sharded import check_space, load, newest_valid, on_rank_0
from titans_dist.checkpoint.store import Store
from titans_dist.config import Config, HealthError, Interrupted, UserError
from titans_dist.config.layout import describe_layout
from titans_dist.model import describe
from titans_dist.parallel.engines import build_engine
from titans_dist.parallel.peers import busy, mark
from titans_dist.parallel.processes import maximum, processes
from titans_dist.parallel.requests import LOOK_S, Asked, Requests
from titans_dist.parallel.results import StepAbandoned, StepResult
from titans_dist.parallel.stage import MicroBatch
from titans_dist.parallel.stragglers import Stragglers
from titans_dist.run.data import open_training
from titans_dist.run.folder import write_config, write_status
from titans_dist.run.identity import check_identity, identity
from titans_dist.tracking import StepRow, Tracker, human
from titans_dist.training.faults import Faults
from titans_dist.training.health import Finding, Health
from titans_dist.training.mixture import report_edit
from titans_dist.training.saving import Saving, checkpoint_meta, describe_job

OPTIMIZER_BYTES = 12
"""Per parameter: float32 master weights and two moments."""
RECENT_STEPS = 20


def train(config: Config) -> None:
    """Train until `training.steps`, from the newest valid checkpoint of the run folder or from the start.

    Runs in every process of the job (see `processes`). Raises Interrupted after a signal, a STOP file or a deadline,
    once a checkpoint is saved; HealthError when the policy of `health` gives up; CheckpointError where the folder holds
    another run, or another job that lives trains this one.
    """
    requests = Requests(Path(config.run_dir), config.training.max_minutes, os.environ["RANK"] == "0")
    with processes(config) as device, ExitStack() as held:
        Training(config, device, requests, held).run()


class Training:
    """One start of one run."""

    def __init__(self, config: Config, device: torch.device, requests: Requests, held: ExitStack) -> None:
        """`held` lets go of files, threads and the lease."""
        self.config, self.device, self.requests, self.held = config, device, requests, held
        self.main = dist.get_rank() == 0
        self.identity, self.health, self.faults = identity(config), Health(config.health), Faults()
        self.store = Store(Path(config.run_dir) / "checkpoints")
        self.lease: Lease | None = None  # rank 0 holds it for all
        self.tracker: Tracker | None = None  # rank 0 alone speaks
        with busy("looking for a checkpoint"):
            self.resumed = self._newest()
        self.meta: dict[str, Any] = {} if self.resumed is None else self.store.meta(self.resumed)
        if self.meta:
            check_identity(self.meta["identity"], self.identity, config.run_dir)
        if self.meta.get("health"):
            self.health.load(self.meta["health"])
        self.data = open_training(config, self.meta.get("data"))
        torch.manual_seed(config.training.seed)  # for layers of a user's that draw; ours do not
        with busy("building the model"):
            self.engine = build_engine(config, device)
        self.job = describe_job(config, self.engine.data_size)
        self.stragglers = Stragglers(config.health.straggler, timeout_s=config.cluster.timeout_s)
        self.saving = Saving(self.store, config.checkpoint, config.cluster.timeout_s, self._size(), self.resumed or 0)
        held.callback(self.saving.saver.close)
        self._loss = math.nan
        self._step_times: deque[float] = deque(maxlen=RECENT_STEPS)
        self._poll_every = 1

    def run(self) -> None:
        """Resume, then one optimizer step after another."""
        done, steps = self.resumed or 0, self.config.training.steps
        if done >= steps:
            self._say(f"{self.config.run_dir} is done: {done} of {steps} steps")
            return
        if self.resumed is not None:
            self._load(done)
        self._start(done)
        done, asked = self._train(done)
        self._end(done, asked)

    def _newest(self) -> int | None:
        """The newest sound checkpoint, here or in the mirror. Nothing is written where there is none."""
        if on_rank_0(self.store.root.is_dir):
            self._take_lease()
        newest, mirror = newest_valid(self.store, self._say), self.config.checkpoint.mirror
        if newest is None and mirror is not None:
            self._take_lease()
            newest = on_rank_0(lambda: restore(self.store, mirror, self._say))
        return newest

    def _load(self, step: int) -> None:
        with busy(f"loading step {step}"):
            self.engine.load(load(self.store, step, self.engine.sharded_state(is_loading=True)), step)

    def _train(self, done: int) -> tuple[int, Asked]:
        """Steps until the end or until it is asked for; the number of steps that are done."""
        steps = self._batches(done)
        while True:
            asked, is_busy = self._agree()
            if asked.stop or done == self.config.training.steps:
                return done, asked
            wants_save = asked.save and done > self.saving.last
            if (wants_save or self.saving.is_due(done)) and not is_busy:
                self._save(done)
                self.requests.obeyed(asked)
            elif asked.save and not wants_save:
                self.requests.obeyed(asked)
            try:
                step = self._step(steps, done)
            except StepAbandoned as abandoned:
                return done, abandoned.args[0]
            if step < done:
                steps = self._batches(step)
            done = step

    def _agree(self) -> tuple[Asked, bool]:
        """What all ranks know now: what was asked for, and whether a save is under way on any of them."""
        self.saving.report(self.tracker)
        # Between two polls inside a step about LOOK_S pass, for whoever has the fastest micro-batches.
        count = self.config.training.global_batch_size // self.config.training.micro_batch_size // self.engine.data_size
        every = int(LOOK_S * count / self._step_times[-1]) if self._step_times else 1
        numbers = (int(self.saving.saver.busy), self.saving.trouble, every)
        asked, (is_busy, trouble, every) = self.requests.asked(self._needed_s(), *numbers)
        self._poll_every = max(1, every)
        if trouble:
            self._status("interrupted")
            raise self.saving.error(trouble)
        return asked, bool(is_busy)

    def _needed_s(self) -> float:
        """Seconds before a deadline at which the run has to stop: for one more step, and the save after that."""
        saves = 2 if self.saving.saver.busy else 1
        return self.config.checkpoint.margin * saves * self.saving.longest_s + max(self._step_times, default=0.0)

    def _poll(self, number: int) -> None:
        """Between two micro-batches: leave the step if a stop is asked for."""
        if number == 0:
            return
        mark(f"step {self.engine.scheduler.num_steps + 1}, micro-batch {number + 1}")
        if number % self._poll_every == 0:
            asked, _ = self.requests.asked(self._needed_s())
            if asked.stop:
                raise StepAbandoned(asked)

    def _step(self, steps: Iterator[tuple[int, list[MicroBatch]]], done: int) -> int:
        """The next step with its metrics; returns the number of steps done, fewer than before after going back."""
        step, interval = done + 1, self.config.tracking.memory_interval
        mark(f"step {step}")
        self.stragglers.begin_step()
        started = time.perf_counter()
        _, micro_batches = next(steps)
        waited = time.perf_counter() - started
        self.faults.before_step(step, self.engine)
        self.engine.observes = interval > 0 and step % interval == 0
        result, finding = self._computed(micro_batches, done)
        seconds = time.perf_counter() - started
        self._step_times.append(seconds)
        self._report(step, result, seconds, waited / seconds)
        if finding is None and self.engine.observes:
            finding = self._memories(result)
        if finding is None:
            self.health.passed(result.loss, result.grad_norm)
            return step
        return self._unhealthy(step, finding, result, micro_batches)

    def _computed(self, micro_batches: list[MicroBatch], done: int) -> tuple[StepResult, Finding | None]:
        """One step, or two: what is not finite is computed once more."""
        health, engine = self.health, self.engine
        engine.lr_scale = health.lr_scale(done + 1)
        for attempt in range(1 + self.config.health.redo):
            engine.scheduler.num_steps = done
            result = engine.step(micro_batches, lambda loss, norm: health.find(loss, norm) is None, self._poll)
            finding = health.find(result.loss, result.grad_norm)
            if attempt == 0:
                first = finding
            if finding is None or finding.is_finite:
                break
        health.updates += result.is_applied
        if first is not None and finding is None and self.tracker is not None:
            self.tracker.event("redone", step=done + 1, why=first.why)
        self._loss = result.loss
        return result, finding

    def _unhealthy(self, step: int, finding: Finding, result: StepResult, micro_batches: list[MicroBatch]) -> int:
        """The policy's decision, noted and carried out."""
        why = finding.why if finding.is_finite else f"{finding.why}: {self.engine.culprit(micro_batches)}"
        action = self.health.act(step)
        target = self._earlier_checkpoint(step) if action == "go back" else None
        if action == "go back" and target is None:
            action = "give up"
        if self.tracker is not None:
            self.tracker.event("unhealthy", step=step, action=action, why=why, is_updated=result.is_applied)
        if target is not None:
            self._go_back(step, target)
            return target
        if action == "give up":
            self._status("interrupted")
            raise HealthError(
                f"step {step} is unhealthy ({why}), and so were steps before it; the last checkpoint is sound: start "
                "again with a smaller optimizer.lr, or look at the event rows of metrics.jsonl"
            )
        return step

    def _earlier_checkpoint(self, step: int) -> int | None:
        """Where the policy goes back to: the checkpoint it names, or the oldest there is."""
        self.saving.wait(self.tracker)
        committed = [saved for saved in on_rank_0(self.store.committed) if saved < step]
        return committed[-self.config.health.rollback_to :][0] if committed else None

    def _go_back(self, step: int, target: int) -> None:
        """Go on from `target` with the data after `step`, and make sure that a restart would do so too."""
        on_rank_0(lambda: self.store.verify(target))
        meta = self.store.meta(target)
        self._load(target)
        self.health.gone_back(step, meta["health"] or Health(self.config.health).state(), target)
        # Saved anew before the later ones go: a kill in between leaves the run as it was before it went back.
        self._save(target)
        self.saving.wait(self.tracker)
        on_rank_0(lambda: self.store.discard_after(target))
        if self.tracker is not None:
            self.tracker.event("went_back", step=target, from_step=step, left_out=self.health.left_out)

    def _memories(self, result: StepResult) -> Finding | None:
        """What is wrong with the memories, as rank 0 sees it; the others learn only that something is."""
        finding = self.health.find_in_memories(result.memories or {}) if self.main else None
        (is_found,) = maximum([int(finding is not None)])
        return finding or (Finding("a memory", True) if is_found else None)

    def _batches(self, done: int) -> Iterator[tuple[int, list[MicroBatch]]]:
        data, training = self.config.data, self.config.training
        return batches(
            self.data.rows,
            self.data.schedule,
            done + self.health.left_out,
            self.engine.data_rank,
            self.engine.data_size,
            training.micro_batch_size,
            data.workers,
            data.fetch_ahead,
        )

    def _start(self, done: int) -> None:
        """Open the run folder and say what is about to be trained."""
        config, size_bytes = self.config, self._size()
        self._take_lease()
        warning = on_rank_0(lambda: check_space(self.store, size_bytes, config.checkpoint.keep))
        if not self.main:
            return
        write_config(config)
        self._status("running")
        self._say(
            f"{Path(config.run_dir).name} | {human(self._parameters())} parameters | {self.job['world']} processes = "
            f"{describe_layout(config.parallel, self.engine.data_size)} on {self.device.type} | "
            f"{human(self.data.rows.num_tokens)} tokens in rows of {config.data.sequence_length}"
        )
        if warning:
            self._say(f"warning: {warning}")
        self.tracker = Tracker(
            Path(config.run_dir), config, resumed_step=self.resumed, wandb_id=self.meta.get("wandb_id")
        )
        self.held.callback(self.tracker.close)
        if self.data.is_edited:
            report_edit(self.tracker, self.data, config, done + self.health.left_out)

    def _take_lease(self) -> None:
        """Nobody else may write this run's checkpoints from now on."""
        if on_rank_0(lambda: self.lease is None):
            on_rank_0(self._acquire)

    def _acquire(self) -> None:
        self.lease = self.store.lease = Lease.acquire(self.store.root)
        self.held.callback(self.lease.release)

    def _save(self, step: int) -> None:
        """Begin to save."""
        mark(f"saving step {step}")
        states = {
            "data": self.data.state(step + self.health.left_out),
            "health": self.health.state(),
            "wandb_id": self.tracker.wandb_id if self.tracker is not None else None,
        }
        meta = checkpoint_meta(self.config, self.identity, self.job, step, self._loss, **states)
        self.saving.start(step, self.engine.sharded_state(), meta, self.engine.copies)

    def _end(self, done: int, asked: Asked) -> None:
        """Save what is not saved yet, and say how the run ended."""
        is_stopped = done < self.config.training.steps
        by = f"stopped by {asked.stop}" if is_stopped else "done"
        self.saving.wait(self.tracker)
        if done == (self.resumed or 0) and self.saving.last == done:
            self._status("interrupted")
            self.requests.obeyed(asked)
            raise Interrupted(f"{by} before the first step, nothing was lost; start it again to go on")
        if self.saving.last != done or self.saving.failure is not None:
            self._save(done)
            self.saving.wait(self.tracker)
        if (failure := self.saving.failure) is not None:
            self._status("interrupted")
            if failure.is_fenced:
                raise self.saving.error(2)
            raise UserError(
                f"stopped after step {done}, which could not be saved; the earlier checkpoints are sound: "
                "make room and start again to go on from the newest"
            )
        self.requests.obeyed(asked)
        if is_stopped:
            self._status("interrupted")
            raise Interrupted(f"{by} after step {done}, which is saved")
        self._status("done")

    def _report(self, step: int, result: StepResult, seconds: float, data_wait: float) -> None:
        rows = self.stragglers.end_step(step, data_wait * seconds)
        if self.tracker is None:
            return
        tokens = self.config.training.global_batch_size * self.config.data.sequence_length
        self.tracker.step(
            StepRow(
                step=step,
                loss=result.loss,
                grad_norm=result.grad_norm,
                lr=result.lr,
                tokens=step * tokens,
                tokens_per_s=tokens / seconds,
                step_time_s=seconds,
                data_wait=data_wait,
                memory_bytes=self._memory_bytes(),
            )
        )
        if result.memories:
            self.tracker.memories(step, result.memories)
        for row in rows:
            self.tracker.event(**row)

    def _parameters(self) -> int:
        return sum(count for _, _, count, _ in describe(self.config.model))

    def _size(self) -> int:
        """About the bytes of a checkpoint."""
        weights = 2 if self.config.training.precision == "bfloat16" else 4
        return self._parameters() * (OPTIMIZER_BYTES + weights)

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
