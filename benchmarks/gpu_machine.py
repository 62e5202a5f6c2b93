"""What gpu.py needs of a machine that has only its Python: this checkout's packages, times, processes, a description.

Importing it makes `titans_dist` and `titans_kernels` importable where they are not installed.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

ROOT = Path(__file__).parents[1]
PACKAGES = {"titans_dist": ROOT, "titans_kernels": ROOT / "kernels"}
ROUNDS_S = 30
"""After so many seconds no new round of timings begins."""
Call = Callable[[], object]
Row = dict[str, Any]
Item = TypeVar("Item")


def make_importable() -> None:
    """Add the source roots of packages that are not installed, and the one name that is needed of omegaconf."""
    for package, root in PACKAGES.items():
        if importlib.util.find_spec(package) is None:
            sys.path.append(str(root))
    if importlib.util.find_spec("omegaconf") is None:
        stand_in = types.ModuleType("omegaconf")
        stand_in.MISSING = "???"  # type: ignore[attr-defined]
        sys.modules["omegaconf"] = stand_in


make_importable()


@dataclass(frozen=True)
class Settings:
    """One run: on which device, how much of everything, and from which random numbers."""

    device: str
    quick: bool
    tiny: bool
    seed: int
    ends: float
    """`time.monotonic()` after which nothing new begins."""

    @property
    def backend(self) -> str:
        """What stands for the kernels: on CPUs the torch form."""
        return "triton" if self.device == "cuda" else "torch"

    @property
    def seconds_left(self) -> float:
        return self.ends - time.monotonic()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_taking_turns(calls: dict[str, Call], device: str, runs: int) -> dict[str, list[float]]:
    """Seconds of `runs` calls of each, one of each in every round; by events on a GPU. Slow ones get fewer rounds."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    ends = time.monotonic() + ROUNDS_S
    for _ in range(runs):
        for name, call in calls.items():
            found[name].append(_seconds(call, device))
        if time.monotonic() > ends:
            break
    return found


def _seconds(call: Call, device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def peak_bytes(call: Call, device: str) -> int | None:
    """Most bytes of new tensors alive at once during `call`; on CPUs nobody counts."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def why(error: BaseException) -> str:
    """An error in one short line."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def attempt(function: Callable[[Item], Row], item: Item) -> Row:
    """`function(item)`, or {"error": why not}."""
    try:
        return function(item)
    except Exception as error:
        return {"error": why(error)}


@dataclass(frozen=True)
class _Attempt:
    function: Callable[[Any], Row]

    def __call__(self, numbered: tuple[int, Any]) -> tuple[int, Row]:
        return numbered[0], attempt(self.function, numbered[1])


def in_processes(
    function: Callable[[Item], Row], items: Sequence[Item], workers: int, seconds: float
) -> Iterator[tuple[Item, Row]]:
    """Each item with its result, in the order in which they come; what is not done in time has an error.

    Each in a process of its own, so that one that breaks the GPU breaks no other; with 0 workers in this one.
    """
    if workers == 0:
        yield from ((item, attempt(function, item)) for item in items)
        return
    ends, left = time.monotonic() + seconds, dict(enumerate(items))
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=1) as pool:
        results = pool.imap_unordered(_Attempt(function), list(left.items()))
        while left:
            try:
                number, row = results.next(max(0.1, ends - time.monotonic()))
            except multiprocessing.TimeoutError:
                break
            yield left.pop(number), row
    yield from ((item, {"error": "not done in time"}) for item in left.values())


def describe_machine(device: str) -> Row:
    """Card, driver, versions and the commit, as far as they can be found out."""
    found: Row = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "card": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD") or "unknown",
        "uncommitted changes": bool(_output("git", "-C", str(ROOT), "status", "--porcelain")),
        "cores": os.cpu_count(),
    }
    for package in ("triton", "titans_pytorch", "fla", "megatron.core"):
        found[package] = _version(package)
    return found


def _version(package: str) -> str:
    from importlib import metadata

    names = {"titans_pytorch": "titans-pytorch", "fla": "fla-core", "megatron.core": "megatron-core"}
    try:
        return metadata.version(names.get(package, package))
    except metadata.PackageNotFoundError:
        return "not installed"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
