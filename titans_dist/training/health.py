"""Whether a step is healthy, and what to do when it is not: a ladder that ends.

    redo            what is not finite is computed once more; a fault of the machine does not come twice
    skip            the update is not made
    lower           the learning rate is lower for some steps
    go back         to an earlier checkpoint, and past the data since then
    give up         HealthError, exit code 5

A loss, gradient norm, weight norm or surprise is a spike when it is too many robust standard deviations (1.4826 times
the median absolute deviation) above the median of the healthy values before it. What is unhealthy does not enter the
statistics that judge the next step. The whole state is plain numbers and goes into checkpoints, so a resumed run
decides as the unbroken one would.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

from titans_dist.config import HealthConfig

ROBUST = 1.4826
"""Makes the median absolute deviation of normally distributed numbers their standard deviation."""
FLOOR = 0.05
"""A standard deviation counts as at least this share of the median: a flat curve must not make all else a spike."""
MEMORY_NUMBERS = ("w_norm", "surprise_before", "surprise_after")
MEMORY_ROWS = 8
"""Rows on a memory before it is judged; there is one in tracking.memory_interval steps."""


@dataclass(frozen=True)
class Finding:
    """What is wrong with a step."""

    why: str
    is_finite: bool


class Health:
    """The statistics and the rung that the run stands on. The same on every rank, as all that it is told is."""

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self.updates = 0
        """Updates made since the start of the run."""
        self.rollbacks = 0
        self.detours: list[list[int]] = []
        """Of each time the run went back: the step it went back to, and the steps whose data was left out by then."""
        self._losses: deque[float] = deque(maxlen=config.window)
        self._norms: deque[float] = deque(maxlen=config.window)
        self._memories: dict[str, deque[float]] = {}
        self._unhealthy: list[int] = []
        self._lower_until = 0

    @property
    def left_out(self) -> int:
        """Steps whose data was left out: the next step n reads what step n + left_out would have read."""
        return self.detours[-1][1] if self.detours else 0

    def find(self, loss: float, grad_norm: float) -> Finding | None:
        """What is wrong with a step of these numbers, if anything is."""
        for name, value, before in (("loss", loss, self._losses), ("gradient norm", grad_norm, self._norms)):
            if not math.isfinite(value):
                return Finding(f"{name} {value}", False)
            if len(before) >= self.config.window and is_spike(value, before, self.config.spike):
                return Finding(f"{name} {value:.4g}, the median is {statistics.median(before):.4g}", True)
        return None

    def find_in_memories(self, layers: dict[str, dict[str, Any]]) -> Finding | None:
        """What is wrong with the memories that telemetry has seen; healthy numbers enter the statistics."""
        if self.config.memory_spike == 0:
            return None
        healthy = []
        for path, numbers in layers.items():
            for name in MEMORY_NUMBERS:
                value = numbers.get(name)
                if value is None:
                    continue
                before = self._memories.setdefault(f"{path} {name}", deque(maxlen=self.config.window))
                if not math.isfinite(value):
                    return Finding(f"{name} {value} in {path}", False)
                if len(before) >= MEMORY_ROWS and is_spike(value, before, self.config.memory_spike):
                    median = statistics.median(before)
                    return Finding(f"{name} {value:.4g} in {path}, the median is {median:.4g}", True)
                healthy.append((before, value))
        for before, value in healthy:
            before.append(value)
        return None

    def passed(self, loss: float, grad_norm: float) -> None:
        """A healthy step of these numbers is over."""
        self._losses.append(loss)
        self._norms.append(grad_norm)

    def lr_scale(self, step: int) -> float:
        """What the learning rate of this step is multiplied by."""
        return self.config.lower_lr if step <= self._lower_until else 1.0

    def act(self, step: int) -> str:
        """The next rung, after an unhealthy step: skip, lower, go back or give up."""
        recent = [earlier for earlier in self._unhealthy if earlier > step - self.config.window]
        self._unhealthy = [*recent, step]
        if step > self._lower_until:
            if len(recent) < self.config.skips:
                return "skip"
            if self.config.lower_lr < 1:
                self._lower_until = step + self.config.lower_steps
                return "lower"
        return "go back" if self.rollbacks < self.config.rollbacks else "give up"

    def gone_back(self, from_step: int, checkpoint: dict[str, Any], to_step: int) -> None:
        """Take up the statistics of the checkpoint, but remember that it was gone back to, and why."""
        rollbacks = self.rollbacks + 1
        detours = [*self.detours, [to_step, self.left_out + from_step - to_step]]
        self.load(checkpoint)
        self.rollbacks, self.detours = rollbacks, detours

    def state(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {
            "updates": self.updates,
            "rollbacks": self.rollbacks,
            "detours": self.detours,
            "losses": list(self._losses),
            "norms": list(self._norms),
            "memories": {name: list(values) for name, values in self._memories.items()},
            "unhealthy": self._unhealthy,
            "lower_until": self._lower_until,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over a `state`; a shorter window keeps the newest."""
        window = self.config.window
        self.updates, self.rollbacks, self.detours = state["updates"], state["rollbacks"], list(state["detours"])
        self._losses, self._norms = deque(state["losses"], window), deque(state["norms"], window)
        self._memories = {name: deque(values, window) for name, values in state["memories"].items()}
        self._unhealthy, self._lower_until = list(state["unhealthy"]), state["lower_until"]


def is_spike(value: float, before: deque[float], limit: float) -> bool:
    """Whether `value` is more than `limit` robust standard deviations above the median of `before`; 0: never."""
    if limit == 0:
        return False
    median = statistics.median(before)
    deviation = ROBUST * statistics.median(abs(x - median) for x in before)
    return value > median + limit * max(deviation, FLOOR * abs(median))
