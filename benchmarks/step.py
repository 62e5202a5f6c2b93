"""Whole training steps as a user runs them, on each layout: `titans-dist train data=synthetic ...` in new processes.

Times are those of metrics.jsonl: data, forward, backward, optimizer and all communication. The first steps do not
count. Further overrides go to every run:

    python benchmarks/step.py [model.memory.chunk_size=64 ...]
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from timing import show, spread

from titans_dist.tracking import read_metrics

HALF, QUARTER = "training.micro_batch_size=4", "training.micro_batch_size=2"
DEEPSPEED = ["parallel.tensor=1", "parallel.data=2", HALF, "training.engine=deepspeed"]
LAYOUTS = {
    "one process": ["parallel.tensor=1", "parallel.data=1"],
    "one process, 4 micro-batches": ["parallel.tensor=1", "parallel.data=1", QUARTER],
    "tensor 2, sequence parallel": ["parallel.tensor=2"],
    "tensor 2": ["parallel.tensor=2", "parallel.sequence=false"],
    "data 2": ["parallel.tensor=1", "parallel.data=2", HALF],
    "context 2, heads": ["parallel.tensor=1", "parallel.context=2", "parallel.context_mode=heads"],
    "context 2, ring": ["parallel.tensor=1", "parallel.context=2", "parallel.context_mode=ring"],
    "pipeline 2, 4 micro-batches": ["parallel.tensor=1", "parallel.pipeline=2", QUARTER],
    "pipeline 2 of 2 parts, 4 micro-batches": [
        *("parallel.tensor=1", "parallel.pipeline=2", "parallel.virtual=2", QUARTER),
    ],
    "tensor 2 x context 2 (4 processes)": ["parallel.tensor=2", "parallel.context=2"],
    "tensor 2 x pipeline 2, 4 micro-batches (4 processes)": ["parallel.tensor=2", "parallel.pipeline=2", QUARTER],
    "data 2, DeepSpeed ZeRO-1": [*DEEPSPEED, "training.zero_stage=1"],
    "data 2, DeepSpeed ZeRO-2": [*DEEPSPEED, "training.zero_stage=2"],
    "data 2, DeepSpeed ZeRO-3": [*DEEPSPEED, "training.zero_stage=3"],
}
WARMUP, COUNTED = 3, 5


def measure(layout: list[str], overrides: list[str], folder: Path) -> list[dict]:
    """The counted training rows of one run; exits with the run's own code and message if it fails."""
    steps = WARMUP + COUNTED
    command = [sys.executable, "-m", "titans_launch", "train", "data=synthetic", f"training.steps={steps}",
               f"checkpoint.interval={steps}", f"hydra.run.dir={folder}",
               *layout, *overrides]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        sys.exit(f"{' '.join(command)} exited with {done.returncode}:\n{done.stderr}")
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "train"]
    return rows[WARMUP:]


def main() -> None:
    overrides = sys.argv[1:]
    table = []
    first = None
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, layout) in enumerate(LAYOUTS.items()):
            rows = measure(layout, overrides, Path(folder) / str(number))
            times = [row["step_time_s"] for row in rows]
            speed = statistics.median(row["tokens_per_s"] for row in rows)
            first = first or speed
            memory = max(row["memory_bytes"] for row in rows) / 2**30
            wait = 100 * statistics.median(row["data_wait"] for row in rows)
            table.append([name, spread(times, 1e-3), f"{speed:,.0f}", f"{speed / first:.2f}x", f"{memory:.2f}",
                          f"{wait:.1f} %"])  # fmt: skip
    show(
        "Training step of experiment=quickstart" + "".join(f" {override}" for override in overrides),
        ["layout", f"ms, median of {COUNTED} (min .. max)", "tokens/s", "speed", "GiB per process", "waiting for data"],
        table,
    )


if __name__ == "__main__":
    main()
