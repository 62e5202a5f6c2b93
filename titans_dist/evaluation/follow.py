"""Evaluation that follows training: every committed checkpoint of a run, by a schedule and within a budget.

What is done is known by the ledger alone, so a follower may be killed at any moment and started again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from titans_dist.checkpoint.store import Store
from titans_dist.config import CheckpointError, Config, ConfigError, UserError
from titans_dist.evaluation.driver import check_tasks, measure, open_ledger
from titans_dist.evaluation.publish import Publisher
from titans_dist.evaluation.work import pieces
from titans_dist.run.folder import read_status


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One that is committed, and where it stands in its run."""

    step: int
    digest: str
    ordinal: int
    """Its number in the run, from 1, by its step and the interval between checkpoints: the same whoever counts."""
    is_last: bool
    """Whether the run ends with it."""
    wandb_id: str | None


def due(tasks: list[str], every: dict[str, int], checkpoint: Checkpoint) -> list[str]:
    """The tasks to measure of a checkpoint: each at every so many of them, and all of the last."""
    return [task for task in tasks if checkpoint.is_last or checkpoint.ordinal % every.get(task, 1) == 0]


class Follower:
    """Looks for checkpoints and measures them, the newest first."""

    def __init__(self, config: Config, run: Config, say: Callable[[str], None]) -> None:
        """`config`: what to measure of the run, and how. `run`: the run as it was started."""
        self.config, self.say = config, say
        self.folder = Path(config.run_dir)
        self.store = Store(self.folder / "checkpoints")
        self.ledger = open_ledger(config)
        self.publisher = Publisher(config, run)
        self.failed: list[str] = []
        """Sentences on checkpoints that are not measured whole."""
        self._said: set[str] = set()
        self._given_up: set[str] = set()
        self._waiting: dict[str, Checkpoint] = {}
        self._measured = 0
        self._began, self._spent_s = time.monotonic(), 0.0

    def follow(self) -> None:
        """Until the run is done and all is measured, or nothing new has come for evaluation.follow.patience_s.

        Raises ConfigError for tasks that cannot be measured, UserError where the first checkpoint, or at the end any,
        could not be measured whole.
        """
        settings = self.config.evaluation.follow
        check_tasks(self.config)
        try:
            self._look()  # tells of wandb
            self.publisher.publish(self.ledger.rows())  # what a follower that was killed has left
            quiet_since = time.monotonic()
            while True:
                is_done = read_status(self.folder) == "done"  # before looking: nothing can be committed behind it
                if newest := self._look():
                    quiet_since = time.monotonic()
                    if is_done or self._affords(newest):
                        self._measure(newest)
                        continue
                elif is_done:
                    self.say("the run is done, and all there is to measure of it is measured")
                    break
                elif time.monotonic() - quiet_since >= settings.patience_s:
                    self.say(f"no new checkpoint for {settings.patience_s:,.0f} s; start it again when there is one")
                    break
                time.sleep(settings.poll_s)
        finally:
            self.publisher.close()
        if self.failed:
            more = f", and {len(self.failed) - 1} more" if len(self.failed) > 1 else ""
            raise UserError(f"{self.failed[0]}{more}; the same command tries again")

    def _look(self) -> Checkpoint | None:
        """The newest checkpoint that waits; of those that are gone or damaged it is said."""
        broken = [path for path in self.store.leftovers() if not path.name.endswith(".tmp")]
        committed = self._committed()  # last: what has come or gone since is no damage
        whole = {self.store.folder(checkpoint.step) for checkpoint in committed.values()}
        for path in broken:
            if path not in whole and path.exists():
                self._once(f"{path} is damaged: its manifest cannot be read; it is passed over")
        for digest in self._waiting.keys() - committed.keys():
            self._once(f"step {self._waiting[digest].step:,} was removed before its turn; it is passed over")
        self._waiting = {
            digest: checkpoint
            for digest, checkpoint in committed.items()
            if digest not in self._given_up and self._missing(checkpoint)
        }
        return max(self._waiting.values(), key=lambda checkpoint: checkpoint.step, default=None)

    def _committed(self) -> dict[str, Checkpoint]:
        """By digest, the oldest first."""
        found = [checkpoint for step in self.store.committed() if (checkpoint := self._checkpoint(step))]
        if found:
            self.publisher.wandb_id = found[-1].wandb_id
        return {checkpoint.digest: checkpoint for checkpoint in found}

    def _checkpoint(self, step: int) -> Checkpoint | None:
        """None where it has gone in this moment."""
        try:
            meta, digest = self.store.meta(step), self.store.digest(step)
        except CheckpointError:
            return None
        saved = meta.get("config") or dataclasses.asdict(self.config)
        return Checkpoint(
            step=step,
            digest=digest,
            ordinal=max(1, step // saved["checkpoint"]["interval"]),
            is_last=step >= saved["training"]["steps"],
            wandb_id=meta.get("wandb_id"),
        )

    def _missing(self, checkpoint: Checkpoint) -> bool:
        settings = self.config.evaluation
        wanted = pieces(settings, due(settings.tasks, settings.follow.every, checkpoint))
        return not {piece.key for piece in wanted} <= self.ledger.done(checkpoint.digest)

    def _affords(self, checkpoint: Checkpoint) -> bool:
        """Whether the time that went into measuring is within the budget; what was too much is waited for."""
        passed_s = time.monotonic() - self._began
        allowed_s = self.config.evaluation.follow.budget * passed_s
        if self._spent_s <= allowed_s:
            return True
        self._once(
            f"step {checkpoint.step:,} waits: {self._spent_s:,.0f} s of {passed_s:,.0f} s went into measuring, and "
            f"evaluation.follow.budget={self.config.evaluation.follow.budget:g} allows {allowed_s:,.0f} s",
            about=checkpoint.digest,
        )
        return False

    def _measure(self, checkpoint: Checkpoint) -> None:
        """Measure what is due of a checkpoint, and publish it."""
        settings = self.config.evaluation
        tasks = due(settings.tasks, settings.follow.every, checkpoint)
        settings = dataclasses.replace(settings, step=checkpoint.step, tasks=tasks)
        started = time.monotonic()
        try:
            measure(dataclasses.replace(self.config, evaluation=settings), self.say)
            self._measured += 1
        except ConfigError:
            raise
        except (UserError, OSError) as error:
            self._failed(checkpoint, error)
        finally:
            self._spent_s += time.monotonic() - started
        self.publisher.publish(self.ledger.rows([checkpoint.step]))

    def _failed(self, checkpoint: Checkpoint, error: UserError | OSError) -> None:
        """Pass over a checkpoint that is gone or damaged. Raises what is of the machine, or comes at the first one."""
        self._given_up.add(checkpoint.digest)
        there = self._checkpoint(checkpoint.step)
        if there is None or there.digest != checkpoint.digest:
            self.say(f"step {checkpoint.step:,} was removed while it was read; it is passed over")
        elif isinstance(error, CheckpointError):
            self.say(f"{error}; it is passed over")
        elif isinstance(error, OSError) or not self._measured:
            raise error
        else:
            self.say(f"step {checkpoint.step:,}: {error}")
            self.failed.append(f"step {checkpoint.step:,} could not be measured whole: {error}")

    def _once(self, sentence: str, about: str | None = None) -> None:
        """Say it, but not again of the same thing."""
        if (about or sentence) not in self._said:
            self._said.add(about or sentence)
            self.say(sentence)
