"""Wall times of a call, and the table they go into."""

from __future__ import annotations

import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

Call = Callable[[], object]
Rival = tuple[str | None, Callable[[], Call], str]
"""The package it needs, how to make its call, and what it computes."""


def seconds(call: Callable[[], object], runs: int = 5, warmup: int = 2) -> list[float]:
    """Wall seconds of each of `runs` calls, after `warmup` calls that do not count."""
    for _ in range(warmup):
        call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def taking_turns(calls: Sequence[Callable[[], object]], runs: int = 5, warmup: int = 2) -> list[list[float]]:
    """Wall seconds of `runs` calls of each, one of each in every round: a busy machine then slows all of them."""
    for call in calls:
        for _ in range(warmup):
            call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(runs):
        for call, own in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            own.append(time.perf_counter() - start)
    return times


def spread(times: Sequence[float], unit: float = 1.0) -> str:
    """Median with smallest and largest, in units of `unit` seconds."""
    return f"{statistics.median(times) / unit:,.1f} ({min(times) / unit:,.1f} .. {max(times) / unit:,.1f})"


def compare(title: str, rivals: dict[str, Rival], tokens: int, runs: int) -> None:
    """One table of rivals, each call of which is `tokens` tokens; the first is the unit of time."""
    calls = {
        name: make()
        for name, (package, make, _) in rivals.items()
        if package is None or importlib.util.find_spec(package) is not None
    }
    times = dict(zip(calls, taking_turns(list(calls.values()), runs), strict=True))
    base = statistics.median(times[next(iter(rivals))])
    rows = []
    for name, (package, _, semantics) in rivals.items():
        if name not in times:
            rows.append([name, f"{package} is not installed", "", "", semantics])
            continue
        median = statistics.median(times[name])
        speed = f"{tokens / median:,.0f}"
        rows.append([name, spread(times[name], 1e-3), speed, f"{median / base:.2f}x", semantics])
    show(title, ["", f"ms, median of {runs} (min .. max)", "tokens/s", "time", "computes"], rows)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, with the machine it was made on."""
    import torch

    table = Table(title=title, caption=f"{_processor()}, {os.cpu_count()} cores, torch {torch.__version__}")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=130).print(table)


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open() as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
