"""Which process holds the others up, and which host a single slow step is due to.

In a synchronous step all processes take the same time: the fast ones wait for the slow one. So what counts is a rank's
own time: that of the step less what it has waited for others (`waiting`).

On GPUs the host runs ahead of the device and waits where it asks for a result, not for other processes. Seen there is
what makes the host itself slow: data, Python, a busy CPU, a disk. A GPU that computes slower than the others is not:
all ranks then show the same own time.
"""

from __future__ import annotations

import collections
import datetime
import socket
import statistics
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from titans_dist.parallel.waiting import waited_s

COMPARED_S = 2.0
"""Ranks are compared over so many seconds of steps, at least."""
SLOW_STEP = 3.0
"""How many times its median a step must take to be reported,"""
SLOW_STEP_S = 0.25
"""and how many seconds longer."""
_HISTORY, _FEWEST = 50, 5
_SLOWEST = 3  # of one window are reported


class _Window(NamedTuple):
    """Sums over the steps of one rank since it last reported."""

    steps: float = 0.0
    wall_s: float = 0.0
    own_s: float = 0.0
    data_wait_s: float = 0.0


class _SlowStep(NamedTuple):
    step: float = 0.0
    seconds: float = 0.0
    own_s: float = 0.0
    median_s: float = 0.0


def _added(old: _Window, new: _Window) -> _Window:
    return _Window(*(one + other for one, other in zip(old, new, strict=True)))


class Stragglers:
    """Compares the ranks' own times. Made, and asked after each step, on all of them.

    A rank is slow where its own time per step is more than `factor` times the median of the ranks that do the same
    work: those of its pipeline stage. Of a stage with one rank nothing can be said. A `factor` of 0 turns all off.
    """

    def __init__(self, factor: float, interval: int = 10, timeout_s: float = 600) -> None:
        self.factor, self.interval = factor, interval
        self._window = _Window()
        self._slow: list[_SlowStep] = []
        self._history: collections.deque[float] = collections.deque(maxlen=_HISTORY)
        self._steps = 0
        self._began = self._waited_s = 0.0
        self._is_alone = dist.get_world_size() == 1 or factor == 0
        if self._is_alone:
            return
        # On the CPU, and apart from the step's own: what is compared must not wait for a device.
        self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
        pipelined = parallel_state.model_parallel_is_initialized()
        about = (socket.gethostname(), parallel_state.get_pipeline_model_parallel_rank() if pipelined else 0)
        everybody: list[tuple[str, int]] = [("", 0)] * dist.get_world_size()
        dist.all_gather_object(everybody, about, group=self._group)
        self._hosts, self._stages = [host for host, _ in everybody], [stage for _, stage in everybody]
        self._sums = [_Window()] * dist.get_world_size()

    def begin_step(self) -> None:
        """A step begins, with its wait for data."""
        self._began = time.perf_counter()
        self._waited_s = waited_s()

    def end_step(self, step: int, data_wait_s: float = 0.0) -> list[dict[str, Any]]:
        """A step is over, of which `data_wait_s` went by waiting for data; collective every `interval` steps.

        Returns on rank 0 what there is to report, elsewhere nothing. A slow rank: `name` "straggler", `step`, `rank`,
        `host`, its own seconds per step `own_s`, the `data_wait_s` among them, and the `median_s` of its equals. A
        single slow step: `name` "slow_step", `step`, `seconds`, their `median_s`, and the `host` whose own time it
        was, `own_s`; "all" where that is no host's, or every host's.
        """
        if self._is_alone:
            return []
        seconds = time.perf_counter() - self._began
        own_s = seconds - (waited_s() - self._waited_s)
        self._steps += 1
        if self._steps > 1:  # the first one compiles, and fills caches
            self._window = _added(self._window, _Window(1, seconds, own_s, data_wait_s))
            self._look_at(step, seconds, own_s)
        return self._compare(step) if self._steps % self.interval == 0 else []

    def _look_at(self, step: int, seconds: float, own_s: float) -> None:
        if len(self._history) >= _FEWEST:
            median_s = statistics.median(self._history)
            if seconds > SLOW_STEP * median_s and seconds > median_s + SLOW_STEP_S:
                self._slow.append(_SlowStep(step, seconds, own_s, median_s))
        self._history.append(seconds)

    def _compare(self, step: int) -> list[dict[str, Any]]:
        slowest = sorted(self._slow, key=lambda slow: -slow.seconds)[:_SLOWEST]
        slowest += [_SlowStep()] * (_SLOWEST - len(slowest))
        report = torch.tensor([*self._window, *(value for slow in slowest for value in slow)], dtype=torch.float64)
        self._window, self._slow = _Window(), []
        is_main = dist.get_rank() == 0
        reports = [torch.empty_like(report) for _ in self._hosts] if is_main else None
        dist.gather(report, reports, dst=0, group=self._group)
        if reports is None:
            return []
        first = len(_Window._fields)
        rows = [row.tolist() for row in reports]
        self._sums = [_added(old, _Window(*row[:first])) for old, row in zip(self._sums, rows, strict=True)]
        slow_steps = [
            [_SlowStep(*row[place : place + 4]) for place in range(first, len(row), 4) if row[place]] for row in rows
        ]
        return self._stragglers(step) + self._slow_steps(slow_steps)

    def _stragglers(self, step: int) -> list[dict[str, Any]]:
        windows = self._sums
        if min(window.wall_s for window in windows) < COMPARED_S:
            return []
        self._sums = [_Window()] * len(windows)
        own = [window.own_s / window.steps for window in windows]
        found = []
        for rank, window in enumerate(windows):
            equals = [own[other] for other, stage in enumerate(self._stages) if stage == self._stages[rank]]
            median_s = statistics.median_low(equals)  # of two ranks, the faster one
            if len(equals) > 1 and own[rank] > self.factor * median_s:
                found.append(
                    {
                        "name": "straggler",
                        "step": step,
                        "rank": rank,
                        "host": self._hosts[rank],
                        "own_s": round(own[rank], 4),
                        "median_s": round(median_s, 4),
                        "data_wait_s": round(window.data_wait_s / window.steps, 4),
                    }
                )
        return found

    def _slow_steps(self, slow_steps: list[list[_SlowStep]]) -> list[dict[str, Any]]:
        found = []
        hosts = set(self._hosts)
        for number in sorted({slow.step for of_rank in slow_steps for slow in of_rank}):
            by_host: dict[str, _SlowStep] = {}
            for host, of_rank in zip(self._hosts, slow_steps, strict=True):
                for slow in of_rank:
                    if slow.step == number and slow.own_s >= by_host.get(host, _SlowStep()).own_s:
                        by_host[host] = slow
            guilty = {
                host: slow
                for host, slow in by_host.items()
                if slow.own_s > slow.median_s + (slow.seconds - slow.median_s) / 2
            }
            if not guilty or (len(guilty) == len(hosts) and len(hosts) > 1):
                guilty = {"all": max(by_host.values(), key=lambda slow: slow.seconds)}
            for host, slow in guilty.items():
                found.append(
                    {
                        "name": "slow_step",
                        "step": int(number),
                        "host": host,
                        "seconds": round(slow.seconds, 4),
                        "own_s": round(slow.own_s, 4),
                        "median_s": round(slow.median_s, 4),
                    }
                )
        return found
