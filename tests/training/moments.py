"""Moments of a run: what a rank is told before it starts, so that something happens at an exact step.

Only the timing is made up; what happens (a kill, a signal, a failing write) is real.
"""

from __future__ import annotations

import itertools
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from titans_dist.checkpoint.store import Store

Before = Callable[[int], None]


def hold_before_step(step: int) -> Before:
    """All ranks wait for ever before they take `step`."""
    return at_steps({step: lambda rank: _wait()})


def hold_in_save(step: int) -> Before:
    """Rank 0 waits for ever inside the save of `step`: the files are there, the manifest is not."""

    def before(rank: int) -> None:
        commit = Store.commit

        def held(store: Store, saved: int, meta: dict[str, Any], **more: Any) -> Path:
            if saved == step:
                _wait()
            return commit(store, saved, meta, **more)

        mock.patch.object(Store, "commit", held).start()

    return before


def full_disk(rank: int, first: int, last: int) -> Before:
    """From before step `first` until after step `last`, `rank` cannot make files of more than 100 kB."""

    def limit(here: int, size_bytes: int | None) -> None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        if here == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size_bytes is None else size_bytes, hard))

    return at_steps({first: lambda here: limit(here, 100_000), last + 1: lambda here: limit(here, None)})


def at_steps(actions: dict[int, Callable[[int], None]]) -> Before:
    """Call `actions[n](rank)` in each rank before the n-th step that it takes."""

    def before(rank: int) -> None:
        from titans_dist.parallel.engine import Engine, StepResult

        take, numbers = Engine.step, itertools.count(1)

        def step(engine: Engine, batches: list[Any], *more: Any) -> StepResult:
            number = next(numbers)
            if number in actions:
                actions[number](rank)
            return take(engine, batches, *more)

        mock.patch.object(Engine, "step", step).start()

    return before


def _wait() -> NoReturn:
    while True:
        signal.pause()
