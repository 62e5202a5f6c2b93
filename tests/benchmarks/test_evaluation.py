"""The benchmark of evaluation runs, and its ratios are those of the figures beside them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "evaluation.py"


def number(cell: str) -> float:
    return float(cell.rstrip("x").replace(",", ""))


@pytest.mark.slow
def test_memory_and_speed_by_length_are_told_as_shares_of_the_first() -> None:
    command = [sys.executable, BENCHMARK, "--quick", "stream"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    assert [row[0] for row in rows] == ["512", "1,024"]
    first, second = ([number(cell) for cell in row] for row in rows)
    assert first[2] == first[4] == 1.0
    assert second[2] == pytest.approx(second[1] / first[1], abs=0.01)
    assert second[4] == pytest.approx(second[3] / first[3], abs=0.01)
    assert min(first) > 0 and first[5] > 1, "a command with Ray takes more than a second"
    assert f"Memory at most {max(second[2], 1):.2f}x that at 512 tokens" in done.stdout
