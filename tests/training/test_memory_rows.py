"""How the memories are doing is written down every `tracking.memory_interval` steps, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.jobs import SIZES, TENSOR_2, TEXT, Run, finish

TRAIN = ("train", *TEXT, *SIZES, *TENSOR_2)


@pytest.mark.parametrize(("interval", "steps"), [(5, [5, 10]), (0, [])])
def test_rows_on_the_health_of_the_memories(
    interval: int, steps: list[int], home: Path, name: str, unbroken: Callable[[str], Run]
) -> None:
    # Two micro-batches: the first is the one that is looked at.
    finish(home, *TRAIN, f"tracking.memory_interval={interval}", f"name={name}", world=2)
    run = Run(home / "runs" / name)
    rows = [row for row in run.rows if row["kind"] == "memory"]
    assert [row["step"] for row in rows] == steps
    for row in rows:
        assert list(row["layers"]) == ["blocks.0.mixer.memory.memory", "blocks.1.mixer.memory.memory"]
        for layer in row["layers"].values():
            assert layer["surprise_before"] > 0
            # 4 sequences of 32 tokens, and 2 of the 4 heads: those of the first process.
            assert sum(layer["alpha"]["counts"]) == 4 * 32 * 2
    assert run.curve == unbroken("tensor2").curve
