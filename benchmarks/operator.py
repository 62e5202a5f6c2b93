"""The memory operator by itself, forward and backward: the chunked form beside the token-by-token recurrence.

Both compute the same numbers, from the same inputs, with gradients of every input, on all cores. The recurrence is
batched over sequences and heads and writes its inner gradient out by hand, as the chunked form does.

    python benchmarks/operator.py [--length 1024] [--chunk-size 64] [--heads 4] [--head-dim 64] [--depth 2]
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable

import torch
from timing import seconds, show, spread
from torch import Tensor
from torch.nn import functional as F

from titans_dist.memory import MemorySpec, MemoryState, initial_state
from titans_dist.memory.chunked import dual_form
from titans_dist.memory.naive import recurrence

Form = Callable[..., tuple[Tensor, MemoryState]]


def make_call(form: Form, args: argparse.Namespace, outputs: list[Tensor]) -> Callable[[], None]:
    """A forward and backward pass of `form` on fixed random inputs; keeps the last y in `outputs`."""
    spec = MemorySpec(depth=args.depth, expansion=args.expansion)
    g = torch.Generator().manual_seed(0)
    shape = (args.batch, args.heads, args.length, args.head_dim)
    q, k, v = (torch.randn(shape, generator=g) for _ in range(3))
    alpha, eta, theta = (torch.rand(shape[:3], generator=g) * high for high in (0.1, 0.9, 0.01 / args.chunk_size))
    shapes = zip(spec.shapes(args.head_dim), spec.initial_std(args.head_dim), strict=True)
    weights = [torch.randn(args.heads, *size, generator=g) * std for size, std in shapes]
    norm = (torch.ones(args.heads, 1, args.head_dim), torch.zeros(args.heads, 1, args.head_dim))
    inputs = [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, alpha, eta, theta]
    leaves = [x.requires_grad_() for x in (*inputs, *weights, *norm)]

    def call() -> None:
        state = initial_state(spec, weights, args.batch)
        y, _ = form(spec, *inputs, norm, state, args.chunk_size, "after")
        torch.autograd.grad(y.square().mean(), leaves)
        outputs[:] = [y.detach()]

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 1), ("length", 1024), ("heads", 4), ("head-dim", 64), ("depth", 2),
                          ("expansion", 4), ("chunk-size", 64), ("threads", os.cpu_count()), ("runs", 5)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, tuple[list[float], Tensor]] = {}
    for name, form in (("chunked dual form", dual_form), ("token by token", recurrence)):
        outputs: list[Tensor] = []
        results[name] = (seconds(make_call(form, args, outputs), args.runs), outputs[0])
    slow = statistics.median(results["token by token"][0])
    tokens = args.batch * args.length
    rows = [
        [
            name,
            spread(times, 1e-3),
            f"{tokens / statistics.median(times):,.0f}",
            f"{slow / statistics.median(times):.1f}x",
            f"{(y - results['token by token'][1]).abs().max().item():.1e}",
        ]
        for name, (times, y) in results.items()
    ]
    show(
        f"Memory operator, forward + backward: batch {args.batch}, T {args.length}, {args.heads} heads of "
        f"{args.head_dim}, depth {args.depth}, expansion {args.expansion}, chunk {args.chunk_size}, float32, "
        f"{args.threads} threads",
        ["form", f"ms, median of {args.runs} (min .. max)", "tokens/s", "speed", "largest difference of y"],
        rows,
    )


if __name__ == "__main__":
    main()
