"""The memory by itself, forward and backward, beside what else can be installed: speed, semantics, growth with T.

    python benchmarks/operator.py [--length 512] [--chunk-size 16] [--heads 4] [--head-dim 32] [--device cpu] [...]
    python benchmarks/operator.py --peers [--layers 2] [--segment 128] [--vocabulary 256] [...]

Three tables: the layer beside titans-pytorch's; forms of the operator beside flash-linear-attention's references; time
per token and peak memory as the sequence grows. With --peers instead: the layer, and whole training steps (see
whole_step.py), beside titans-pytorch's. Rivals take turns within each run, so that a busy machine slows all of them.
Peers come with `pip install "titans-dist[peers]"`; without them their rows say so.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import whole_step
from timing import Call, compare, show, taking_turns
from torch import Tensor, nn
from torch.nn import functional as F

from titans_dist.config import MemoryConfig, ModelConfig
from titans_dist.layers.inner_memory import InnerMemory
from titans_dist.layers.mixers import build_mixer
from titans_dist.layers.parameter import Parameter, initial_value
from titans_dist.memory import MemorySpec, neural_memory

LENGTHS = (2048, 4096, 8192, 16384)

# torch.compile starts Python processes with this one's path, where this file must not stand in for Python's `operator`.
sys.path.remove(str(Path(__file__).parent))


def layer(args: argparse.Namespace, backend: str = "torch") -> Call:
    """This project's memory layer with its projections, convolutions, gates and norms."""
    memory = MemoryConfig(
        depth=args.depth,
        expansion=args.expansion,
        chunk_size=args.chunk_size,
        backend=backend,
    )
    hidden = args.heads * args.head_dim
    config = ModelConfig(
        variant="lmm", hidden_size=hidden, num_heads=args.heads, persistent_tokens=0, memory=memory, num_layers=1
    )
    module = build_mixer(config)
    with torch.no_grad():
        for name, value in module.named_parameters():
            assert isinstance(value, Parameter)
            value.copy_(initial_value(name, value, 0))
    for part in module.modules():
        if isinstance(part, InnerMemory):
            part.recompute = args.recompute
    return trained(module.to(args.device), args)


def titans_pytorch_layer(args: argparse.Namespace, exact: bool) -> Call:
    """Its NeuralMemory of the same sizes; `exact`: the gradient's chunk is the update's, as in the paper."""
    from titans_pytorch import NeuralMemory

    module = NeuralMemory(
        dim=args.heads * args.head_dim,
        chunk_size=args.chunk_size,
        batch_size=args.chunk_size if exact else None,
        model=whole_step.their_network(args),
        **whole_step.their_options(args),
    )
    return trained(whole_step.own_parameters(module).to(args.device), args)


def trained(module: nn.Module, args: argparse.Namespace) -> Call:
    """Forward and backward of a layer (B, T, hidden) -> (B, T, hidden), or a tuple that begins with it."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(args.batch, args.length, args.heads * args.head_dim, generator=g).to(args.device)

    def call() -> None:
        y = module(x)
        (y[0] if isinstance(y, tuple) else y).square().mean().backward()
        synchronize(args)

    return call


def synchronize(args: argparse.Namespace) -> None:
    if args.device != "cpu":
        torch.cuda.synchronize()


def arguments(args: argparse.Namespace, spec: MemorySpec) -> dict[str, Any]:
    """Fixed random arguments of `neural_memory`, all requiring gradients."""
    g = torch.Generator().manual_seed(0)
    shape = (args.batch, args.length, args.heads, args.head_dim)
    q, k, v = (torch.randn(shape, generator=g) for _ in range(3))
    top = 0.5 if spec.is_delta_rule else 0.1 / args.chunk_size
    alpha, eta, theta = (torch.rand(shape[:3], generator=g) * high for high in (0.01, 0.9, top))
    sizes = zip(spec.shapes(args.head_dim), spec.initial_std(args.head_dim), strict=True)
    weights = [torch.randn(args.heads, *size, generator=g) * std for size, std in sizes]
    norm = (torch.ones(args.heads, args.head_dim), torch.zeros(args.heads, args.head_dim))
    tensors = {"q": F.normalize(q, dim=-1), "k": F.normalize(k, dim=-1), "v": v}
    tensors |= {"alpha": alpha, "eta": eta, "theta": theta}

    def leaf(x: Tensor) -> Tensor:
        return x.to(args.device).requires_grad_()

    return {name: leaf(x) for name, x in tensors.items()} | {
        "weights": [leaf(w) for w in weights],
        "norm": tuple(leaf(x) for x in norm) if spec.residual else None,
    }


def operator(args: argparse.Namespace, spec: MemorySpec, **options: Any) -> Call:
    """Forward and backward of the operator."""
    inputs = arguments(args, spec)
    leaves = [x for x in inputs.values() if isinstance(x, Tensor)] + [*inputs["weights"], *(inputs["norm"] or ())]

    def call() -> Tensor:
        y, _ = neural_memory(**inputs, spec=spec, **{"chunk_size": args.chunk_size, **options})
        torch.autograd.grad(y.square().mean(), leaves, allow_unused=True)
        synchronize(args)
        return y.detach()

    return call


def fla_gated_delta_rule(args: argparse.Namespace) -> Call:
    """flash-linear-attention's chunked reference in plain torch (its Triton kernels need a GPU)."""
    from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule

    inputs = arguments(args, MemorySpec.preset("gated_deltanet"))
    leaves = [inputs[name] for name in ("q", "k", "v", "alpha", "theta")]

    def call() -> Tensor:
        q, k, v, alpha, theta = leaves
        y, _ = naive_chunk_gated_delta_rule(
            q, k, v, g=(1 - alpha).log(), beta=2 * theta, chunk_size=args.chunk_size, scale=1.0
        )
        torch.autograd.grad(y.square().mean(), leaves)
        synchronize(args)
        return y.detach()

    return call


def fla_titans_linear(args: argparse.Namespace) -> Call:
    """flash-linear-attention's reference of Titans with a matrix memory, residual and norm."""
    from fla.ops.titans.naive import chunk_titans_linear_ref

    inputs = arguments(args, MemorySpec(depth=1))
    names = ("q", "k", "v", "theta", "alpha", "eta")
    leaves = [inputs[name] for name in names]
    gain, bias = inputs["norm"]

    def call() -> Tensor:
        q, k, v, *gates = leaves
        y, _ = chunk_titans_linear_ref(
            q, k, v, gain, bias, *(gate.unsqueeze(-1) for gate in gates), chunk_size=args.chunk_size
        )
        torch.autograd.grad(y.square().mean(), leaves, allow_unused=True)
        synchronize(args)
        return y.detach()

    return call


def sizes(args: argparse.Namespace) -> str:
    return (
        f"batch {args.batch}, T {args.length}, {args.heads} heads of {args.head_dim}, depth {args.depth}, expansion "
        f"{args.expansion}, chunk {args.chunk_size}, float32, {args.device}, {args.threads} thread(s)"
    )


def layers_table(args: argparse.Namespace) -> None:
    """This layer beside titans-pytorch's."""
    exact = "every token's write, per-token reads, momentum and decay per token"
    compare(
        f"Memory layer, forward + backward: {sizes(args)}",
        {
            "titans_dist": (None, lambda: layer(args), exact),
            "titans_dist, backend=compiled": (None, lambda: layer(args, "compiled"), "the same"),
            "titans-pytorch, exact mode": (
                "titans_pytorch",
                lambda: titans_pytorch_layer(args, exact=True),
                "the paper's chunks; momentum and decay per chunk, reads per chunk",
            ),
            "titans-pytorch, as it comes": (
                "titans_pytorch",
                lambda: titans_pytorch_layer(args, exact=False),
                "all gradients at the memory before the sequence: not the recurrence",
            ),
        },
        args.batch * args.length,
        args.runs,
    )


def steps_tables(args: argparse.Namespace) -> None:
    """Whole training steps beside titans-pytorch's."""
    model, tokens = f"{args.layers} blocks, vocabulary {args.vocabulary}", args.batch * args.length
    title = f"Whole training step, memory alone: {model}, {sizes(args)}"
    compare(title, whole_step.alone(args), tokens, args.runs)
    title = f"Whole training step, memory as context: segments of {args.segment}, {model}, {sizes(args)}"
    compare(title, whole_step.as_context(args), tokens, args.runs)


def operators_table(args: argparse.Namespace) -> None:
    """Forms of the operator, and flash-linear-attention's references where they compute the same thing."""
    titans, delta = MemorySpec(depth=args.depth, expansion=args.expansion), MemorySpec.preset("gated_deltanet")
    matrix = MemorySpec(depth=1)
    compare(
        f"Memory operator, forward + backward: {sizes(args)}",
        {
            "chunked": (None, lambda: operator(args, titans), "Titans, exact"),
            "chunked, recompute": (None, lambda: operator(args, titans, recompute=True), "the same"),
            "chunked, compiled": (None, lambda: operator(args, titans, backend="compiled"), "the same"),
            "token by token": (None, lambda: operator(args, titans, backend="recurrent"), "the same"),
            "matrix memory": (None, lambda: operator(args, matrix), "Titans, depth 1"),
            "fla titans reference": (
                "fla",
                lambda: fla_titans_linear(args),
                "Titans, depth 1, inner gradient off by a factor",
            ),
            "gated delta rule": (None, lambda: operator(args, delta), "Gated DeltaNet, exact"),
            "fla gated delta reference": ("fla", lambda: fla_gated_delta_rule(args), "Gated DeltaNet, exact"),
        },
        args.batch * args.length,
        args.runs,
    )


def growth_table(args: argparse.Namespace) -> None:
    """Time per token and peak memory of one forward and backward as T grows."""
    rows, args.batch, spec = [], 1, MemorySpec(depth=args.depth, expansion=args.expansion)
    for recompute in (False, True):
        calls = []
        for length in args.lengths:
            args.length = length
            calls.append(operator(args, spec, recompute=recompute))
        times = taking_turns(calls, args.runs)
        per_token = [statistics.median(t) / length for t, length in zip(times, args.lengths, strict=True)]
        for length, call, seconds in zip(args.lengths, calls, per_token, strict=True):
            peak = peak_bytes(call) if args.device == "cpu" else peak_bytes_of_gpu(call)
            rows.append(
                [
                    "states recomputed" if recompute else "all kept",
                    f"{length:,}",
                    f"{seconds * 1e6:.1f}",
                    f"{seconds / per_token[0]:.2f}",
                    f"{peak / 2**20:,.0f}",
                    f"{peak / length / 1024:.1f}",
                ]
            )
    columns = ["for the backward pass", "T", "us per token", "relative", "peak MiB", "KiB per token"]
    args.length = "below"
    show(f"Growth with T, forward + backward of the operator: {sizes(args)}", columns, rows)


def peak_bytes_of_gpu(call: Call) -> int:
    """Most bytes of new tensors alive at once during `call` on the GPU."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def peak_bytes(call: Call) -> int:
    """Most bytes of new tensors alive at once during `call` on the CPU, from torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    alive = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 2), ("length", 512), ("heads", 4), ("head-dim", 32), ("depth", 2),
                          ("expansion", 4), ("chunk-size", 16), ("threads", 1), ("runs", 9),
                          ("layers", 2), ("segment", 128), ("vocabulary", 256)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--peers", action="store_true", help="the layer and whole steps beside titans-pytorch's, no more"
    )
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS, help="T of the growth table")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--recompute", action="store_true", help="keep only some states for the backward pass")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    layers_table(args)
    if args.peers:
        steps_tables(args)
        return
    operators_table(args)
    if args.lengths:
        growth_table(args)


if __name__ == "__main__":
    main()
