"""`titans-dist quickstart`: prepare, train, kill everything half way, resume, evaluate, and check what came out."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from titans_dist.config import Config, UserError
from titans_dist.tracking import read_metrics
from titans_launch import evaluate, local, tables
from titans_launch.prepare import READY_MADE
from titans_launch.processes import Child

STEPS_AFTER_CHECKPOINT = 3
"""Steps that must be lost by the kill, so that the resume has to do them again."""

Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Story:
    """What metrics.jsonl tells about a run that was killed once: training rows as (step, loss)."""

    first: tuple[int, float]
    killed: tuple[int, float]
    """The last step before the kill."""
    checkpoint: int
    """The newest checkpoint before the kill."""
    resumed: tuple[int, float]
    """The first step after the restart."""
    last: tuple[int, float]
    tokens_per_s: float
    """Median over all steps."""


def run(config: Config) -> int:
    """Go the whole way; the exit code is that of the first command that failed."""
    run_dir = Path(config.run_dir)
    metrics = run_dir / "metrics.jsonl"
    set_aside(run_dir)
    if config.data.format not in READY_MADE and (code := _titans_dist("prepare", run_dir)):
        return code
    print(f"\ntraining; it will be killed about half way, at step {config.training.steps // 2}\n", flush=True)
    if code := _train_and_kill(run_dir, config.training.steps):
        return code
    rows_before = len(read_metrics(metrics))
    print("\nkilled all processes with SIGKILL; starting the same command again\n", flush=True)
    if code := _titans_dist("train", run_dir):
        return code
    story = tell(read_metrics(metrics), rows_before)
    if code := _titans_dist("evaluate", run_dir):
        return code
    _show(story, config, json.loads((run_dir / "reports" / "heldout.json").read_text()))
    check(story)
    return 0


def set_aside(run_dir: Path) -> None:
    """Move an earlier run of this name to the first free NAME.1, NAME.2, ...; the quickstart starts from nothing."""
    if not run_dir.exists() or not any(run_dir.iterdir()):
        return
    number = 1
    while (aside := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    run_dir.rename(aside)
    run_dir.mkdir()
    print(f"moved the earlier {tables.place(run_dir)} to {tables.place(aside)}", flush=True)


def tell(rows: Rows, rows_before: int) -> Story:
    """The story of a run whose first `rows_before` rows were written before the kill."""
    before = [row for row in rows[:rows_before] if row["kind"] == "train"]
    after = [row for row in rows[rows_before:] if row["kind"] == "train"]
    if not before or not after:
        raise UserError("metrics.jsonl has no training steps on one side of the kill; the resumed run did nothing")
    return Story(
        first=(before[0]["step"], before[0]["loss"]),
        killed=(before[-1]["step"], before[-1]["loss"]),
        checkpoint=newest_checkpoint(rows[:rows_before]) or 0,
        resumed=(after[0]["step"], after[0]["loss"]),
        last=(after[-1]["step"], after[-1]["loss"]),
        tokens_per_s=statistics.median(row["tokens_per_s"] for row in before + after),
    )


def check(story: Story) -> None:
    """Raise UserError unless the resume went on right after its checkpoint and the loss went down."""
    if story.resumed[0] != story.checkpoint + 1:
        raise UserError(
            f"the resumed run began at step {story.resumed[0]}, but the newest checkpoint before the kill was at step "
            f"{story.checkpoint}; it should go on at step {story.checkpoint + 1}"
        )
    if not story.last[1] < story.first[1]:
        raise UserError(
            f"the loss went from {story.first[1]:.4f} to {story.last[1]:.4f}; it should go down, "
            "try more training.steps"
        )


def newest_checkpoint(rows: Rows) -> int | None:
    """The step of the newest committed checkpoint."""
    steps = [row["step"] for row in rows if row["kind"] == "event" and row["name"] == "checkpoint"]
    return steps[-1] if steps else None


def due(rows: Rows, steps: int) -> bool:
    """Whether it is time to kill: half way, and some steps past a checkpoint."""
    done = max((row["step"] for row in rows if row["kind"] == "train"), default=0)
    checkpoint = newest_checkpoint(rows)
    return checkpoint is not None and done >= steps // 2 and done >= checkpoint + STEPS_AFTER_CHECKPOINT


def _train_and_kill(run_dir: Path, steps: int) -> int:
    metrics = run_dir / "metrics.jsonl"
    with Child(_command("train", run_dir)) as child:
        while (code := child.wait(0.1)) is None:
            if not child.signalled and metrics.exists() and due(read_metrics(metrics), steps):
                child.kill()
                return 0
    if code == 0:
        raise UserError(
            f"training ended before it could be killed between step {steps // 2} and {steps}; "
            "use more training.steps or a smaller checkpoint.interval"
        )
    return code


def _titans_dist(command: str, run_dir: Path) -> int:
    with Child(_command(command, run_dir)) as child:
        code = child.wait()
    assert code is not None
    return code if code >= 0 else 1


def _command(command: str, run_dir: Path) -> list[str]:
    return [sys.executable, "-m", "titans_launch", command, *local.job_arguments(run_dir)]


def _show(story: Story, config: Config, heldout: dict[str, Any]) -> None:
    run_dir = Path(config.run_dir)
    uniform = math.log(config.model.vocab_size)
    tables.show(
        f"{config.name}: trained, killed, resumed, evaluated",
        [
            (
                "loss at start",
                f"{story.first[1]:.4f}   (even guessing: ln {config.model.vocab_size} = {uniform:.4f})",
            ),
            ("before the kill", f"{story.killed[1]:.4f}   at step {story.killed[0]}"),
            ("after the resume", f"{story.resumed[1]:.4f}   at step {story.resumed[0]}, checkpoint {story.checkpoint}"),
            ("loss at the end", f"{story.last[1]:.4f}   at step {story.last[0]}"),
            ("held-out loss", f"{heldout['loss']:.4f}   bits per byte {evaluate.bits_per_byte(heldout)}"),
            ("speed", f"{story.tokens_per_s:,.0f} tokens/s (median)"),
            ("run", tables.place(run_dir)),
            ("checkpoints", tables.place(run_dir / "checkpoints")),
            ("metrics", tables.place(run_dir / "metrics.jsonl")),
            ("report", tables.place(run_dir / "reports" / "heldout.json")),
        ],
    )
