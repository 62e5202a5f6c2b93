"""evaluation.jsonl is read as it grows: no row is lost, none comes twice, and none is read before it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from titans_dist.tracking.evaluations import Evaluations, for_wandb, newest
from titans_dist.tracking.metrics import MetricsFile


def add(file: MetricsFile, step: int, task: str, mean: float) -> None:
    measures, length = "loss" if task == "positions" else "score", 0 if task.startswith("lm/") else 2048
    fields = {"tokens": 10 * step, "task": task, "length": length, "measures": measures, "mean": mean}
    file.append("evaluation", step, fields)


def means(rows: list[dict[str, Any]]) -> list[float]:
    return [row["mean"] for row in rows]


def test_rows_come_once_and_whole(tmp_path: Path) -> None:
    evaluations = Evaluations(tmp_path)
    assert evaluations.new() == []
    file = MetricsFile(evaluations.path)
    add(file, 1, "passkey", 0.25)
    add(file, 1, "positions", 5.0)
    assert means(evaluations.new()) == [0.25, 5.0]
    assert evaluations.new() == []
    add(file, 2, "passkey", 0.5)
    whole = evaluations.path.read_bytes()
    evaluations.path.write_bytes(whole[:-20])
    assert evaluations.new() == []
    evaluations.path.write_bytes(whole)
    assert means(evaluations.new()) == [0.5]


def test_a_line_that_a_kill_has_torn_is_no_row(tmp_path: Path) -> None:
    evaluations = Evaluations(tmp_path)
    evaluations.path.write_bytes(b'{"kind": "evaluation", "st')
    assert evaluations.new() == []
    add(MetricsFile(evaluations.path), 1, "passkey", 0.25)
    assert means(evaluations.new()) == [0.25]


def test_a_row_is_a_point_of_a_curve_over_tokens(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "evaluation.jsonl")
    add(file, 3, "passkey", 0.25)
    add(file, 3, "lm/piqa", 0.5)
    assert [for_wandb(row) for row in Evaluations(tmp_path).new()] == [
        {"tokens": 30, "step": 3, "evaluation/passkey/2048": 0.25},
        {"tokens": 30, "step": 3, "evaluation/lm/piqa": 0.5},
    ]


def test_the_newest_checkpoint_in_a_line(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    file = MetricsFile(tmp_path / "evaluation.jsonl")
    for step, task, mean in (
        (2000, "passkey", 0.25),
        (2000, "positions", 4.5),
        (2000, "lm/piqa", 0.5),
        (1000, "passkey", 0.5),
    ):
        add(file, step, task, mean)
    assert newest(tmp_path) == "step 2,000: lm/piqa 50%, passkey at 2,048 25%, positions at 2,048 4.500"
