"""Do the memories remember? All models at equal parameters and tokens on associative recall beyond attention's reach.

The task is that of `recall_task`. Every model sees the same sequences, in the same order, with the same optimizer; a
worker process trains one model at a time on one thread. Writes recall.md, recall.json and recall.png.

    python benchmarks/recall.py [--models lmm,mac,...] [--seeds 3] [--steps 600] [--workers 2] [--out runs/recall]
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from recall_report import report
from recall_task import MODELS, Task, model_config
from torch import Tensor, nn
from torch.nn import functional as F

from titans_dist.model import build_model

COST = (
    "mac",
    "mag",
    "mal",
    "lmm",
    "gated_deltanet",
    "transformer",
    "swa",
)  # slowest first, so that workers end together
POINTS = 20  # of the curve of accuracy over tokens


@dataclass(frozen=True)
class Training:
    """The optimizer's settings, the same for every model."""

    steps: int = 600
    batch: int = 32
    lr: float = 5e-3
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    tested: int = 1024  # sequences of the last test

    def rate(self, step: int) -> float:
        """Share of `lr` at `step`: linear warm-up, then half a cosine down to a twentieth."""
        return min(1.0, (step + 1) / self.warmup) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / self.steps)))


@dataclass
class Run:
    """What became of one model from one seed; the curve holds (tokens seen, loss, accuracy)."""

    model: str
    seed: int
    parameters: int
    tokens: int
    seconds: float
    accuracy: float
    curve: list[tuple[int, float, float]]


def train(variant: str, seed: int, task: Task, training: Training) -> Run:
    """Train one model and test it on sequences it has not seen."""
    model = build_model(model_config(variant, task), seed)
    model.set_recompute("none")  # there is memory enough, and it is faster
    groups = [
        {"params": [p for p in model.parameters() if p.decay], "weight_decay": training.weight_decay},
        {"params": [p for p in model.parameters() if not p.decay], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=training.lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, training.rate)
    sequences = torch.Generator().manual_seed(seed)
    held_out = torch.Generator().manual_seed(10**9 + seed)
    few = task.batch(128, held_out)
    every = max(1, training.steps // POINTS)
    curve: list[tuple[int, float, float]] = []
    start = time.perf_counter()
    for step in range(1, training.steps + 1):
        loss = answer_loss(model, *task.batch(training.batch, sequences))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()
        schedule.step()
        if step % every == 0:
            curve.append((step * training.batch * task.length, loss.item(), accuracy(model, *few)))
            if len(curve) % 4 == 0:
                seconds = time.perf_counter() - start
                print(f"{variant:<15} seed {seed}  step {step:>5}/{training.steps}  loss {loss.item():6.3f}  "
                      f"accuracy {curve[-1][-1]:6.1%}  {seconds:4.0f} s", flush=True)  # fmt: skip
    seconds = time.perf_counter() - start
    right = accuracy(model, *task.batch(training.tested, held_out))
    parameters = sum(p.numel() for p in model.parameters())
    return Run(variant, seed, parameters, training.steps * training.batch * task.length, seconds, right, curve)


def answer_loss(model: nn.Module, tokens: Tensor, values: Tensor) -> Tensor:
    """Cross-entropy at the queries, the last tokens of each sequence."""
    return F.cross_entropy(model(tokens)[:, -values.shape[1] :].flatten(0, 1), values.flatten())


@torch.no_grad()
def accuracy(model: nn.Module, tokens: Tensor, values: Tensor) -> float:
    """Share of queries answered right, over the whole vocabulary."""
    parts = zip(tokens.split(64), values.split(64), strict=True)
    right = [(model(x)[:, -y.shape[1] :].argmax(-1) == y).float() for x, y in parts]
    return torch.cat(right).mean().item()


def train_all(jobs: list[tuple[str, int]], task: Task, training: Training, workers: int) -> Iterator[Run]:
    """Each job's run, in the order in which they end."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the workers when they start
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for done in as_completed([pool.submit(train, *job, task, training) for job in jobs]):
            yield done.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}; separated by commas")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model")
    parser.add_argument("--steps", type=int, default=Training.steps)
    parser.add_argument("--workers", type=int, default=2, help="models trained at the same time, a thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/recall"), help="folder of the results")
    args = parser.parse_args()
    models = args.models.split(",")
    for name in models:
        if name not in MODELS:
            parser.error(f"--models {name} is unknown; choose from {', '.join(MODELS)}")
    task, training = Task(), Training(steps=args.steps)
    jobs = [(name, seed) for name in COST if name in models for seed in range(args.seeds)]
    start = time.perf_counter()
    runs = sorted(train_all(jobs, task, training, args.workers), key=lambda run: (models.index(run.model), run.seed))
    report(runs, task, training, time.perf_counter() - start, args.out)


if __name__ == "__main__":
    main()
