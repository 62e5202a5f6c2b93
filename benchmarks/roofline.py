"""What the memory operator costs, what of it fits on a Hopper GPU, and how fast each plan of it could be: five tables.

    python benchmarks/roofline.py [--write]

Nothing is measured: `titans_kernels.roofline` has the counts and the model, and says what in it is guessed. --write
puts the tables into kernels/README.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "kernels"), str(ROOT / "benchmarks")]

from pages import filled, table  # noqa: E402

from titans_kernels.roofline import (  # noqa: E402
    EXCHANGE_CLOCKS,
    H100,
    H200,
    KIB,
    Cost,
    Memory,
    Pass,
    backward_bytes,
    backward_flops,
    cached_passes,
    cost,
    forward_bytes,
    forward_flops,
    is_resident,
    merged_passes,
    programs_needed,
    resident_passes,
    resident_shared_bytes,
)

README = ROOT / "kernels" / "README.md"
BEGIN = "<!-- begin: python benchmarks/roofline.py --write -->"
DIMS, EXPANSIONS, CHUNKS = (64, 96, 128), (1, 2, 4), (16, 32, 64, 128)
STRUCTURES = [(1, dim, 1) for dim in DIMS] + [(2, dim, expansion) for dim in DIMS for expansion in EXPANSIONS]
"""Depth, head dimension, expansion."""
NAMES = {
    "A": "A, resident",
    "B": "B, split over {} programs",
    "C": "C, cached",
    "M": "C, merged",
}


def structure(depth: int, dim: int, expansion: int) -> str:
    return f"{depth}, {dim}, {expansion if depth > 1 else '-'}"


def work_table() -> str:
    """FLOP and bytes per token and head."""
    rows = []
    for depth, dim, expansion in STRUCTURES:
        row = [structure(depth, dim, expansion)]
        for count in (forward_flops, backward_flops):
            for b in CHUNKS:
                row.append(f"{count(Memory.of(depth, dim, expansion, b)) / b / 1000:,.0f}")
        memory = Memory.of(depth, dim, expansion, 64)
        row += [f"{count(memory) / 64:,.0f}" for count in (forward_bytes, backward_bytes)]
        flops, size = forward_flops(memory) + backward_flops(memory), forward_bytes(memory) + backward_bytes(memory)
        row.append(f"{flops / size:,.0f}")
        rows.append(row)
    columns = ["depth, head, expansion", *(f"forward, b={b}" for b in CHUNKS), *(f"backward, b={b}" for b in CHUNKS)]
    return table([*columns, "bytes forward", "bytes backward", "FLOP/byte, b=64"], rows)


def fit_table() -> str:
    """State and shared memory of one head."""
    rows = []
    for depth, dim, expansion in STRUCTURES:
        padded = [Memory.of(depth, dim, expansion, b).padded() for b in CHUNKS]
        row = [structure(depth, dim, expansion), f"{Memory.of(depth, dim, expansion, 1).state_bytes / KIB:,.0f}"]
        row.append(f"{padded[0].state_bytes / KIB:,.0f}")
        for memory in padded:
            programs = programs_needed(memory)
            fits = "fits" if is_resident(memory) else f"{programs} programs" if programs else "no"
            row.append(f"{resident_shared_bytes(memory) / KIB:,.0f}: {fits}")
        rows.append(row)
    columns = ["depth, head, expansion", "state", "state, padded", *(f"shared, b={b}" for b in CHUNKS)]
    return table(columns, rows)


def plans(memory: Memory) -> dict[str, tuple[list[Pass], Memory, int]]:
    """The plans that are possible for a memory: passes, what one program holds, programs."""
    padded, found = memory.padded(), {}
    if is_resident(padded):
        found["A"] = (resident_passes(padded), padded, 1)
    programs = programs_needed(padded)
    if programs and not is_resident(padded):
        share = padded.share(programs)
        found["B"] = (resident_passes(share, EXCHANGE_CLOCKS), share, programs)
    found["C"] = (cached_passes(padded), padded, 1)
    found["M"] = (merged_passes(padded), padded, 1)
    return found


def choice(memory: Memory) -> str:
    """The plan whose training is the fastest on an H100, by the geometric mean of its range."""
    costs = {name: cost(passes, H100, held, n) for name, (passes, held, n) in plans(memory).items()}
    return min(costs, key=lambda name: costs[name].one_by_one * costs[name].overlapped)


def shares(one: Cost, flops: float) -> str:
    low, high = one.share(flops)
    return f"{100 * low:.0f} to {100 * high:.0f} %"


def plan_table(b: int = 64) -> str:
    """Every plan of every structure, forward and training."""
    rows = []
    for each in STRUCTURES:
        memory = Memory.of(*each, b)
        forward, both = forward_flops(memory), forward_flops(memory) + backward_flops(memory)
        chosen = choice(memory)
        for name, (passes, held, programs) in plans(memory).items():
            first = passes[: 3 if name == "C" else 2]
            ahead = cost(first, H100, held, programs)
            h100, h200 = (cost(passes, card, held, programs) for card in (H100, H200))
            rows.append(
                [
                    structure(*each),
                    NAMES[name].format(programs),
                    f"{ahead.one_by_one / 1000:,.1f} to {ahead.overlapped / 1000:,.1f}",
                    ahead.bound,
                    shares(ahead, forward),
                    f"{h100.one_by_one / 1000:,.0f} to {h100.overlapped / 1000:,.0f}",
                    h100.bound,
                    shares(h100, both),
                    shares(h200, both),
                    "**chosen**" if name == chosen else "",
                ]
            )
    columns = ["depth, head, expansion", "plan", "forward, k clocks", "bound", "share",
               "training, k clocks", "bound", "share, H100", "share, H200", ""]  # fmt: skip
    return table(columns, rows)


def choice_table() -> str:
    """The choice and its share in training for every size of a chunk."""
    rows = []
    for each in STRUCTURES:
        row = [structure(*each)]
        for b in CHUNKS:
            memory = Memory.of(*each, b)
            name = choice(memory)
            passes, held, programs = plans(memory)[name]
            both = forward_flops(memory) + backward_flops(memory)
            row.append(f"{NAMES[name].format(programs)}: {shares(cost(passes, H100, held, programs), both)}")
        rows.append(row)
    return table(["depth, head, expansion", *(f"b={b}" for b in CHUNKS)], rows)


def kernel_table(b: int = 64, dim: int = 64) -> str:
    """What each of our kernels does, plan C of two layers, in clocks of each unit."""
    rows = []
    for expansion in EXPANSIONS:
        memory = Memory.of(2, dim, expansion, b)
        for one in cached_passes(memory):
            clocks, h200 = one.clocks(H100, memory), one.clocks(H200, memory)
            units = [f"{clocks[unit] / 1000:.1f}" for unit in ("tensor", "lanes", "L2", "HBM")]
            bound = max(clocks, key=lambda unit: clocks[unit])
            rows.append([f"{expansion}", one.name, f"{one.flops / 1e6:.1f}", *units, f"{h200['HBM'] / 1000:.1f}",
                         f"{clocks['latency'] / 1000:.1f}", bound])  # fmt: skip
        total = sum(one.flops for one in cached_passes(memory))
        needed = forward_flops(memory) + backward_flops(memory)
        rows.append(
            [f"{expansion}", "all, against what is needed", f"{total / 1e6:.1f} / {needed / 1e6:.1f}", *[""] * 7]
        )
    columns = ["expansion", "kernel", "MFLOP", "tensor", "lanes", "L2", "HBM, H100", "HBM, H200", "latency", "bound"]
    return table(columns, rows)


def tables() -> str:
    """All five, each with a line that says what it is."""
    parts = [
        ("Thousand FLOP, and bytes, per token and head, with momentum; b is the chunk.", work_table()),
        (
            "KiB of one head: W and S in float32, as they are and with dimensions padded as Triton holds them; shared "
            "memory of a program that keeps the padded state in registers, and whether it fits, or how many programs "
            "of a cluster do together.",
            fit_table(),
        ),
        (
            "Plans at b = 64: thousand clocks of one multiprocessor per chunk and head, from all units one after "
            "another to all at once; the needed FLOP as a share of the measured rate of matrix products. Training is "
            "forward and backward. Clocks and bounds are an H100's; chosen is the least geometric mean of training's.",
            plan_table(),
        ),
        ("The choice for other chunks, and its share in training on an H100.", choice_table()),
        (
            "Our kernels (C, cached), heads of 64, b = 64, two layers: thousand clocks of one multiprocessor per "
            "chunk, by unit.",
            kernel_table(),
        ),
    ]
    return "\n\n".join(f"{line}\n\n{content}" for line, content in parts)


def with_tables(text: str) -> str:
    """`text` with the tables between its markers."""
    return filled(text, BEGIN, tables())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into kernels/README.md")
    if parser.parse_args().write:
        README.write_text(with_tables(README.read_text()))
    print(tables())


if __name__ == "__main__":
    main()
