"""Evaluation of long contexts: memory and tokens/s by length, and what a second worker brings.

    python benchmarks/evaluation.py                    both tables: about fifteen minutes on two cores
    python benchmarks/evaluation.py stream             one of: stream workers
    python benchmarks/evaluation.py --quick            short contexts, to see that everything runs

Everything is measured as users meet it: a run is trained for two steps, `titans-dist evaluate` asks it for a pass key,
and what it cost is in the ledger. stream: one question at each length, by one worker; beside it the same model that
reads the whole prompt at once, as an evaluation without a state does. workers: the same questions by one worker and by
two, in turns, counted from when all workers have ended their first piece; beside it the wall time of the whole command.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from timing import show, spread

from titans_dist.evaluation.ledger import Ledger, Row

SECTIONS = ("stream", "workers")
LENGTHS = (1 << 15, 1 << 17, 1 << 19, 1 << 21)
QUICK = (1 << 9, 1 << 10)
AT_ONCE = 1 << 17
"""Tokens up to which the whole prompt is read at once, too."""
LARGEST_SHARE, SLOWEST_SHARE, LEAST_GAIN = 1.1, 0.9, 1.7
TINY = ("model.hidden_size=64", "model.num_layers=2", "model.num_heads=2")
"""Overrides of --quick."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="which tables; all unless given")
    parser.add_argument("--quick", action="store_true", help="a small model and short contexts")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of the table by length")
    parser.add_argument("--runs", type=int, default=3, help="rounds of the table of workers")
    arguments = parser.parse_args()
    wanted = arguments.sections or SECTIONS
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        run = Trained(Path(name), TINY if arguments.quick else ())
        if "stream" in wanted:
            stream_table(run, QUICK if arguments.quick else tuple(arguments.lengths))
        if "workers" in wanted:
            length, samples, rounds = (512, 8, 1) if arguments.quick else (4096, 48, arguments.runs)
            workers_table(run, length, samples, rounds)


class Trained:
    """A run of the quickstart's model with one checkpoint."""

    def __init__(self, folder: Path, overrides: tuple[str, ...]) -> None:
        self.folder, self.overrides = folder, ("name=evaluation", "parallel=single", *overrides)
        self.seed = 0
        self.command("prepare")
        self.command("train", "training.steps=2", "checkpoint.interval=2")

    def command(self, name: str, *more: str) -> None:
        """Run titans-dist to its end."""
        command = [sys.executable, "-m", "titans_launch", name, *self.overrides, *more]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)

    def evaluate(self, length: int, samples: int, workers: int) -> tuple[list[Row], float]:
        """Questions that nobody has asked before; the ledger's rows, and seconds of the command."""
        self.seed += 1
        started = time.perf_counter()
        self.command(
            "evaluate",
            *("suite=offline", "evaluation.tasks=[passkey]", f"evaluation.lengths=[{length}]"),
            *(f"evaluation.samples={samples}", "evaluation.shard=1", f"evaluation.workers={workers}"),
            f"evaluation.seed={self.seed}",
        )
        wall = time.perf_counter() - started
        ledger = Ledger(self.folder / "runs" / "evaluation" / "reports" / "evaluation.sqlite")
        return [row for row in ledger.rows() if row.piece.seed == self.seed], wall


def stream_table(run: Trained, lengths: tuple[int, ...]) -> None:
    """A new worker for each length."""
    rows, costs = [], []
    for length in lengths:
        ((row,), wall) = run.evaluate(length, 1, 1)
        costs.append((row.result.peak_bytes, row.result.tokens / row.result.seconds))
        peak, speed = costs[-1]
        whole = at_once(run, length) if length <= AT_ONCE else None
        rows.append(
            [
                f"{length:,}",
                f"{peak / 1e6:,.0f}",
                f"{peak / costs[0][0]:.2f}x",
                f"{speed:,.0f}",
                f"{speed / costs[0][1]:.2f}x",
                f"{wall:,.0f}",
                f"{whole[1] / 1e6:,.0f}" if whole else "not measured",
                f"{length / whole[0]:,.0f}" if whole else "not measured",
            ]
        )
    show(
        "stream: one pass key, by one worker of one thread",
        ["tokens", "peak MB", "", "tokens/s", "", "command s", "at once: peak MB", "tokens/s"],
        rows,
    )
    memory = max(peak for peak, _ in costs) / costs[0][0]
    slowest = min(speed for _, speed in costs) / costs[0][1]
    print(
        f"Memory at most {memory:.2f}x that at {lengths[0]:,} tokens; the aim of {LARGEST_SHARE}x is "
        f"{_kept(memory <= LARGEST_SHARE)}. Slowest {slowest:.2f}x; the aim of {SLOWEST_SHARE}x is "
        f"{_kept(slowest >= SLOWEST_SHARE)}. Peaks are of the worker's process, with torch, Ray, the model, the "
        "prompt's text and its tokens.\n"
    )


def at_once(run: Trained, length: int) -> tuple[float, int]:
    """The same model reads random tokens in one call, in a process of its own: seconds, and bytes at the peak."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_read_at_once, run.folder / "runs" / "evaluation" / "config.yaml", length).result()


def _read_at_once(config: Path, length: int) -> tuple[float, int]:
    import torch
    from omegaconf import OmegaConf

    from titans_dist.config import Config
    from titans_dist.model import build_model
    from titans_launch.app import register, typed

    torch.set_num_threads(1)
    register()
    made = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(config))
    model = build_model(typed(made).model).eval()  # type: ignore[arg-type]
    tokens = torch.randint(0, 256, (1, length))
    with torch.inference_mode():
        model(tokens[:, :256])
        started = time.perf_counter()
        x, _ = model.mix(model.embedding(tokens))
        model.head(model.norm(x[:, -1:]))
        seconds = time.perf_counter() - started
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def workers_table(run: Trained, length: int, samples: int, rounds: int) -> None:
    """One worker and two, in turns."""
    times: dict[int, list[float]] = {1: [], 2: []}
    walls: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for workers in times:
            rows, wall = run.evaluate(length, samples, workers)
            later = rows[workers:]
            tokens = sum(row.result.tokens for row in later)
            times[workers].append((later[-1].time - rows[workers - 1].time) / tokens)
            walls[workers].append(wall)
    base, wall = min(times[1]), min(walls[1])
    show(
        f"workers: {samples} pass keys of {length:,} tokens, {rounds} rounds",
        ["workers", "us per token, median (min .. max)", "speed", "command s, median (min .. max)", "speed"],
        [
            [
                str(workers),
                spread(times[workers], 1e-6),
                f"{base / min(times[workers]):.2f}x",
                spread(walls[workers]),
                f"{wall / min(walls[workers]):.2f}x",
            ]
            for workers in times
        ],
    )
    gain = base / min(times[2])
    print(f"Two workers: {gain:.2f}x of one; the aim of {LEAST_GAIN}x is {_kept(gain >= LEAST_GAIN)}.\n")


def _kept(yes: bool) -> str:
    return "kept" if yes else "missed"


if __name__ == "__main__":
    main()
