"""benchmarks/operator.py runs, in miniature, with every peer that it compares with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "operator.py"


def test_it_prints_its_three_tables() -> None:
    sizes = ["--batch", "1", "--length", "32", "--heads", "2", "--head-dim", "8", "--chunk-size", "8", "--runs", "1"]
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *sizes, "--lengths", "64"], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for row in (
        "titans_dist",
        "titans_dist, backend=compiled",
        "titans-pytorch, exact mode",
        "token by token",
        "fla gated delta reference",
    ):
        assert row in done.stdout
    assert "is not installed" not in done.stdout
    assert "states recomputed" in done.stdout
