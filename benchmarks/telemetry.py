"""What memory-health telemetry costs: a training step with it beside the same step without, taking turns in one run.

    python benchmarks/telemetry.py [--variants lmm mac] [--length 1024] [--batch 2] [--interval 10] [--device cpu] [...]

A step is forward, backward and AdamW. The share is that of one observed step, and of the run: one step in `--interval`
is observed (tracking.memory_interval).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import nullcontext

import torch
from timing import show, spread, taking_turns
from torch.nn import functional as F

from titans_dist.config import ModelConfig
from titans_dist.layers.telemetry import collect
from titans_dist.model import build_model


def step(args: argparse.Namespace, variant: str) -> Callable[[bool], None]:
    """step(observed) does one."""
    config = ModelConfig(
        variant=variant,
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_heads=args.heads,
        vocab_size=1024,
        window=256,
        segment_length=256,
        memory={"chunk_size": args.chunk_size},  # type: ignore[arg-type]
    )
    model = build_model(config).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(1024, (args.batch, args.length + 1), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(args.device)

    def once(observed: bool) -> None:
        with collect() if observed else nullcontext() as records:
            logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if records is not None:
            records.summary(model)
        loss.item()

    return once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 2), ("length", 1024), ("layers", 2), ("hidden", 192), ("heads", 4),
                          ("chunk-size", 64), ("interval", 10), ("threads", 1), ("runs", 15)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--variants", nargs="+", default=["lmm", "mac", "mag", "mal"])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for variant in args.variants:
        once = step(args, variant)
        plain, observed = taking_turns([lambda: once(False), lambda: once(True)], args.runs)  # noqa: B023
        # Of each pair, so that what slows the machine slows both.
        share = statistics.median(b / a - 1 for a, b in zip(plain, observed, strict=True))
        rows.append(
            [variant, spread(plain, 1e-3), spread(observed, 1e-3), f"{share:.2%}", f"{share / args.interval:.2%}"]
        )
    columns = ["", "ms without, median (min .. max)", "ms with", "share of that step", "of the run"]
    sizes = f"batch {args.batch}, T {args.length}, {args.layers} layers, hidden {args.hidden}, chunk {args.chunk_size}"
    show(f"Telemetry in one training step: {sizes}, {args.device}, {args.threads} thread(s)", columns, rows)


if __name__ == "__main__":
    main()
