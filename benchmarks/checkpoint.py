"""Saving and loading beside the disk's own speed: how long training waits, bytes/s, memory.

    python benchmarks/checkpoint.py             tables for one and two processes: about ten minutes on two cores
    python benchmarks/checkpoint.py stall       some of: stall speed memory
    python benchmarks/checkpoint.py --quick     a small model, to see that everything runs

What is saved is a real training: megatron-core's engine in float32, its model, both moments, main weights and random
state, so 16 bytes per parameter. stall: what training waits for when a save is written in the background, beside a save
that it waits for and beside a step; and how much slower steps are meanwhile. speed: bytes/s of saves and loads, beside
the same number of bytes written and read as they are, and beside peers. memory: the largest resident bytes of each
process, beside those before its first save, as a multiple of what the process writes.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from checkpoint_ranks import Measured, Size, run_ranks
from timing import show, spread

SECTIONS = ("stall", "speed", "memory")
WORLDS = (1, 2)
FULL, QUICK = Size(hidden=320, vocabulary=8192, rows=8, length=256), Size(hidden=64, vocabulary=256, rows=2, length=64)
LARGEST_SHARE = 1.3
RIVALS = {
    "save raw": ("raw write", "a file per process, fsync"),
    "save titans_dist": ("titans_dist", "copy, plan, a file per process, fsync, sha256, manifest, rename"),
    "save torch": ("torch.save", "a file per process, fsync"),
    "save megatron": ("megatron dist_checkpointing.save", "plan, two files per process, fsync, index"),
    "load raw": ("raw read", "as many bytes, into memory that is there"),
    "load titans_dist": ("titans_dist", "sizes, index, shapes; into the model and its optimizer"),
    "load torch": ("torch.load", "weights_only=True, into new tensors"),
    "load megatron": ("megatron dist_checkpointing.load", "index, shapes; into the model and its optimizer"),
}
"""What is timed -> its name in the table, and what it does."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="which tables; all unless given")
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--processes", type=int, nargs="+", default=WORLDS, help="of one training")
    parser.add_argument("--runs", type=int, default=7, help="rounds that count")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; else that of temporary files")
    arguments = parser.parse_args()
    wanted = arguments.sections or SECTIONS
    size, rounds = (QUICK, 2) if arguments.quick else (FULL, arguments.runs)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name) / "run"
        for world in arguments.processes if "stall" in wanted else ():
            stall_table(world, size, folder, rounds)
        for world in arguments.processes if "speed" in wanted else ():
            speed_table(world, size, folder, rounds)
        if "memory" in wanted:
            memory_table(arguments.processes, size, folder)


def stall_table(world: int, size: Size, folder: Path, rounds: int) -> None:
    """Each round: some steps, a save that is waited for, and one beside which steps go on until it is committed."""
    ranks = run_ranks("stall", world, size, folder, rounds, 3)
    found: Measured = {key: _slowest(ranks, key) for key in ranks[0]}
    step, blocking = (statistics.median(found[key]) for key in ("step", "blocking"))
    lost = [
        waited + beside - count * step
        for waited, beside, count in zip(found["stall"], found["delay"], found["steps"], strict=True)
    ]
    rows = [
        ("a step alone", found["step"]),
        ("blocking save, the first", found["first blocking"]),
        ("blocking save, later ones", found["blocking"]),
        ("stall of an asynchronous save, the first", found["first stall"]),
        ("stall of an asynchronous save, later ones", found["stall"]),
        ("    from then until it is committed", found["writing"]),
        ("    a step that begins in that time", found["beside"]),
        ("    all that it costs: stall and slower steps", lost),
    ]
    show(
        f"stall: {_state(ranks)}, {_processes(world)}, {rounds} rounds",
        ["", "ms, median (min .. max)", "of a blocking save", "of a step"],
        [
            [what, spread(times, 1e-3), *(f"{statistics.median(times) / base:.1%}" for base in (blocking, step))]
            for what, times in rows
        ],
    )
    print(
        f"Steps use one thread of each process, and the machine has {os.cpu_count()} cores: where all are in use, the "
        "background takes from the steps what it needs.\n"
    )


def speed_table(world: int, size: Size, folder: Path, rounds: int) -> None:
    """All in turns, so that a busy disk slows all of them."""
    ranks = run_ranks("speed", world, size, folder, rounds)
    (total,) = ranks[0]["bytes"]
    rows = []
    for key, (name, does) in RIVALS.items():
        kind = key.split()[0]
        if key not in ranks[0]:
            rows.append([f"{kind}: {name}", "does not work here", "", "", does])
            continue
        times = _slowest(ranks, key)
        median, raw = statistics.median(times), statistics.median(_slowest(ranks, f"{kind} raw"))
        speed = f"{total / 1e6 / median:,.1f}"
        rows.append([f"{kind}: {name}", spread(times, 1e-3), speed, f"{raw / median:.2f}x", does])
    columns = ["", "ms, median (min .. max)", "MB/s", "of raw", "does"]
    show(f"speed: {_state(ranks)}, {_processes(world)}, {rounds} rounds", columns, rows)
    print("Files are dropped from the system's memory before each load; what the disk itself remembers is its own.\n")


def memory_table(worlds: Sequence[int], size: Size, folder: Path) -> None:
    """New processes for each case."""
    rows, largest = [], 0.0
    for world, asynchronous in itertools.product(worlds, (True, False)):
        for rank, found in enumerate(run_ranks("memory", world, size, folder, asynchronous, 4)):
            (written,), peaks = found["written"], (found["saves"][0], max(found["saves"][1:]), *found["load"])
            largest = max(largest, *(peak / written for peak in peaks[:2]))
            kind = "asynchronous" if asynchronous else "blocking"
            cells = [f"{peak / 1e6:,.2f} = {peak / written:.2f}x" for peak in peaks]
            rows.append([f"{_processes(world)}, rank {rank}, {kind}", f"{written / 1e6:,.2f}", *cells])
    show(
        "memory: MB at the peak over those before the first save, as a multiple of what the process writes",
        ["", "writes MB", "first save", "later saves", "load"],
        rows,
    )
    verdict = "kept" if largest <= LARGEST_SHARE else "missed"
    print(
        f"Largest of the saves: {largest:.2f}x; the aim of {LARGEST_SHARE}x is {verdict}. The copy in memory is 1x and "
        "stays for the next save; the rest is what is being written, the index, and what the allocator keeps.\n"
    )


def _slowest(ranks: list[Measured], key: str) -> list[float]:
    """Of each time that of the rank that took longest."""
    return [max(times) for times in zip(*(rank[key] for rank in ranks), strict=True)]


def _state(ranks: list[Measured]) -> str:
    return f"{ranks[0]['bytes'][0] / 1e6:,.2f} MB of state"


def _processes(world: int) -> str:
    return "one process" if world == 1 else f"{world} processes"


if __name__ == "__main__":
    main()
