"""The benchmark of checkpoints runs, and its ratios are those of the times and bytes beside them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from titans_dist.config.sizes import parameter_count

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROUNDING = 0.1
"""Milliseconds are printed with one digit."""
BYTES_PER_PARAMETER = 16  # weights, main weights and two moments in float32


def miniature(section: str) -> tuple[str, dict[str, list[str]]]:
    """What a quick run of one section prints with two processes; its table's rows by their first cell."""
    command = [sys.executable, BENCHMARKS / "checkpoint.py", "--quick", section, "--processes", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    return done.stdout, {cells[0]: cells[1:] for cells in lines if cells[0]}


def number(cell: str) -> float:
    """The first one in a cell."""
    return float(re.search(r"[\d.,]+", cell)[0].replace(",", ""))  # type: ignore[index]


@pytest.fixture
def state_mb(monkeypatch: pytest.MonkeyPatch) -> float:
    """Of the miniature model's training state."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from checkpoint import QUICK
    from checkpoint_ranks import model_config

    return parameter_count(model_config(QUICK)) * BYTES_PER_PARAMETER / 1e6


def ratio(value: float, time_ms: float) -> Any:
    """`value` over a time that was rounded."""
    return pytest.approx(value / time_ms, rel=0.01 + ROUNDING / time_ms, abs=0.1)


def about_the_state(printed_mb: float, state_mb: float) -> bool:
    """Files hold all tensors once, with a frame round each."""
    return state_mb - 0.01 <= printed_mb < 1.5 * state_mb


def test_a_stall_is_told_as_shares_of_a_blocking_save_and_of_a_step(state_mb: float) -> None:
    printed, rows = miniature("stall")
    assert about_the_state(number(re.search(r"stall: .* MB", printed)[0][7:]), state_mb)  # type: ignore[index]
    step, blocking = rows["a step alone"], rows["blocking save, later ones"]
    assert (blocking[1], step[2]) == ("100.0%", "100.0%")
    for what in ("stall of an asynchronous save, later ones", "from then until it is committed"):
        time, *shares = rows[what]
        for share, base in zip(shares, (blocking[0], step[0]), strict=True):
            assert number(share) == ratio(100 * number(time), number(base))


def test_speeds_are_bytes_by_times(state_mb: float) -> None:
    printed, rows = miniature("speed")
    total = number(re.search(r"speed: .* MB", printed)[0][7:])  # type: ignore[index]
    assert about_the_state(total, state_mb)
    for kind in ("save", "load"):
        raw = number(next(cells for name, cells in rows.items() if name.startswith(f"{kind}: raw"))[0])
        rivals = {name: cells for name, cells in rows.items() if name.startswith(f"{kind}: ")}
        assert {f"{kind}: titans_dist", f"{kind}: torch.{kind}", f"{kind}: megatron dist_checkpointing.{kind}"} < {
            *rivals
        }
        for times, speed, share, _ in rivals.values():
            assert number(speed) == ratio(total * 1e3, number(times))
            assert number(share) == pytest.approx(raw / number(times), rel=0.01 + ROUNDING / raw, abs=0.01)


def test_memory_is_told_as_a_multiple_of_what_each_process_writes(state_mb: float) -> None:
    printed, rows = miniature("memory")
    cases = [f"2 processes, rank {rank}, {kind}" for kind in ("asynchronous", "blocking") for rank in (0, 1)]
    found = [rows[case] for case in cases]
    for written, *cells in found:
        for cell in cells:
            megabytes, multiple = map(float, re.fullmatch(r"(\S+) = (\S+)x", cell.replace(",", "")).groups())  # type: ignore[union-attr]
            assert multiple == pytest.approx(megabytes / number(written), rel=0.02, abs=0.02)
            assert megabytes > 0
    for first, second in (found[:2], found[2:]):
        assert about_the_state(number(first[0]) + number(second[0]), state_mb)
        # The first rank writes the model as well: 4 of 16 bytes, and half of the rest.
        assert number(first[0]) / number(second[0]) == pytest.approx(10 / 6, rel=0.1)
    largest = max(number(cell.split("=")[1]) for _, first, later, _ in found for cell in (first, later))
    assert f"Largest of the saves: {largest:.2f}x" in printed
