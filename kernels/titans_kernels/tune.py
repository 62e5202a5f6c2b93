"""Chooses the launch configurations of the memory's kernels, and writes them into this package's table.

python -m titans_kernels.tune          compiles for sm_90: the fewest spills, then the largest block, then few warps
python -m titans_kernels.tune --time   on a GPU: the fastest of those that spill little, for that GPU's own table
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from titans_kernels import gates, read, read_backward, write, write_backward
from titans_kernels.ahead_of_time import Configuration, Usage, compile_ahead
from titans_kernels.launch import SMALLEST
from titans_kernels.memory import chunked_memory
from titans_kernels.table import (
    KERNELS,
    SEQUENTIAL,
    SHAPES,
    Launch,
    state_in_registers,
    table_of,
    write_table,
)

PROGRAMS: dict[str, Any] = {
    "write": write.write_kernel,
    "read": read.read_kernel,
    "queries_backward": read_backward.queries_backward_kernel,
    "reads_backward": read_backward.reads_backward_kernel,
    "write_backward": write_backward.write_backward_kernel,
}
INTEGERS = ("length_t", "heads", "chunks", "first", "count")
INDICES = ("begins", "lengths", "flags")
IN_BF16 = (
    *("q", "k", "v", "y", "raw", "g_y", "g_v", "descents", "chunk_w1", "chunk_s1", "chunk_w2", "chunk_s2"),
    *("from_w1", "from_s1", "from_w2", "from_s2", "inner", "pulled", "queried", "g_inner", "g_raw", "g_outputs"),
    *("g_inputs", "g_hidden"),
)
EXPANSION = 4
SHARED_BYTES = 227 * 1024  # that a block may have on an H100
REPEATS = 5
MOST_APART = 0.02
"""Relative difference of two forms that only round elsewhere, in bfloat16."""
SPILLS_ALIKE = 64
"""Bytes of spills that are not told apart: a few numbers that every thread puts away once per chunk."""


def configuration(kernel: str, depth: int, dim: int, chunk: int, launch: Launch, **choices: object) -> Configuration:
    """One kernel in bfloat16, with momentum, LayerNorm and the l2 loss unless `choices` say otherwise."""
    program = PROGRAMS[kernel]
    constants: dict[str, object] = {
        "HEAD": dim, "HIDDEN": dim * EXPANSION if depth == 2 else dim, "DIM": dim, "CHUNK": chunk, "DEPTH": depth,
        "BLOCK": launch.block if depth == 2 else dim, "MOMENTUM": True, "RESIDUAL": True, "LOSS": "l2",
        "ACTIVATION": "gelu", "STARTS": False, "LIMITED": True, "PRECISION": "tf32x3", **choices,
    }  # fmt: skip
    constants = {name: value for name, value in constants.items() if name in program.arg_names}

    def type_of(name: str) -> str:
        if name in INTEGERS:
            return "i32"
        if name in INDICES:
            return "*i32"
        own_bf16 = {"reads_backward": ("g_q", "g_w1", "g_s1", "g_w2", "g_s2"), "write_backward": ("g_k",)}
        return "*bf16" if name in IN_BF16 or name in own_bf16.get(kernel, ()) else "*fp32"

    signature = {name: type_of(name) for name in program.arg_names if name not in constants}
    chosen = " ".join(f"{name.lower()}={value}" for name, value in choices.items())
    name = f"{kernel} depth {depth} dim {dim} chunk {chunk} {chosen}".rstrip()
    return Configuration(name, program, signature, constants, launch.warps, launch.stages, most_spilled=launch.spilled)


def configurations() -> Iterator[Configuration]:
    """All that sm_90's table holds, at the usual shape the other choices, and the gates."""
    yield from gate_configurations()
    yield from float32_configurations()
    for (kernel, depth, dim, chunk), launch in table_of("sm_90").items():
        yield configuration(kernel, depth, dim, chunk, launch)
    others: list[dict[str, object]] = [
        {"MOMENTUM": False}, {"RESIDUAL": False}, {"LOSS": "huber"}, {"LOSS": "dot"}, {"ACTIVATION": "silu"},
        {"STARTS": True},
    ]  # fmt: skip
    for kernel, choice in itertools.product(KERNELS, others):
        if set(choice) <= set(PROGRAMS[kernel].arg_names):
            usual = table_of("sm_90")[kernel, 2, 64, 64]
            yield configuration(kernel, 2, 64, 64, replace(usual, spilled=usual.spilled + SPILLS_ALIKE), **choice)


def float32_configurations() -> Iterator[Configuration]:
    """Every kernel at the usual shape in float32, which is there to be exact, not fast: it spills."""
    for kernel in KERNELS:
        c = configuration(kernel, 2, 64, 64, SMALLEST)
        signature = {name: "*fp32" if kind == "*bf16" else kind for name, kind in c.signature.items()}
        yield replace(c, name=f"{c.name} float32", signature=signature, most_spilled=2048)


def gate_configurations() -> Iterator[Configuration]:
    """The gates, with forgetting and momentum."""
    for program, chunk in itertools.product((gates.gates_kernel, gates.gates_backward_kernel), (16, 32, 64, 128)):
        constants = {"CHUNK": chunk, "FORGETS": True, "MOMENTUM": True, "READ": "after"}
        types = {"i32": (*INTEGERS, "total"), "*i32": INDICES}
        signature = {
            name: next((kind for kind, names in types.items() if name in names), "*fp32")
            for name in program.arg_names
            if name not in constants
        }
        yield Configuration(f"{program.__name__} chunk {chunk}", program, signature, dict(constants), 1)


def candidates(depth: int, dim: int, chunk: int) -> list[Launch]:
    is_large = dim * chunk > 64 * 64
    blocks: tuple[int, ...] = (16, 32) if is_large else (16, 32, 64)
    blocks, warps = (blocks if depth == 2 else (dim,)), ((8, 16) if is_large else (4, 8))
    return [Launch(block, count) for block in blocks for count in warps]


def usage(kernel: str, depth: int, dim: int, chunk: int, launch: Launch) -> Usage | None:
    """What a candidate takes, or None where it does not compile."""
    c = configuration(kernel, depth, dim, chunk, launch)
    try:
        found = compile_ahead(c.kernel, c.signature, c.constants, c.num_warps, c.num_stages)
    except Exception:  # the compiler's own kinds are many
        return None
    return found if found.shared <= SHARED_BYTES else None


def by_compiling() -> None:
    """sm_90's table, from ptxas' report."""
    chosen = {}
    for kernel, (depth, dim, chunk) in itertools.product(KERNELS, SHAPES):
        found = [(usage(kernel, depth, dim, chunk, x), x) for x in candidates(depth, dim, chunk)]
        able = [(u, x) for u, x in found if u is not None]
        used, best = min(
            able, key=lambda c: (c[0].serialized, c[0].spill_stores // SPILLS_ALIKE, -c[1].block, c[1].warps)
        )
        chosen[kernel, depth, dim, chunk] = best = replace(best, spilled=used.spill_stores)
        print(f"{kernel:17} depth {depth} dim {dim:3} chunk {chunk:3}: {best}", flush=True)
    print(write_table("sm_90", chosen))


def by_timing() -> None:
    """This GPU's table: each kernel's candidates in turn, forward and backward of 32K tokens of 16 heads."""
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
    chosen = dict(table_of(architecture))
    for depth, dim, chunk in SHAPES:
        call = _training_call(depth, dim, chunk)
        for kernel in KERNELS:
            key = (kernel, depth, dim, chunk)
            times = {}
            for candidate in candidates(depth, dim, chunk):
                with _instead(architecture, key, candidate):
                    try:
                        times[candidate] = _milliseconds(call)
                    except Exception as error:  # too much shared memory, or no such layout
                        print(f"{key}: {candidate} does not run: {error}")
            chosen[key] = min(times, key=lambda candidate: times[candidate])
            table_of(architecture)[key] = chosen[key]
            print(f"{key}: {chosen[key]}, {times[chosen[key]]:.3f} ms", flush=True)
    for depth, dim in ((1, 64), (1, 128), (2, 64)):
        if is_better_resident(depth, dim, 64):
            for kernel in SEQUENTIAL:
                chosen[kernel, depth, dim, 64] = replace(chosen[kernel, depth, dim, 64], resident=True)
    print(write_table(architecture, chosen))


def is_better_resident(depth: int, dim: int, chunk: int) -> bool:
    """Whether the state in registers is faster, with the same numbers but for rounding, and the same bits each time."""
    call, device = _training_call(depth, dim, chunk, expansion=2), torch.device("cuda", torch.cuda.current_device())
    found, times = {}, {}
    for wanted in (False, True):
        with state_in_registers(device, wanted):
            found[wanted] = [call() for _ in range(REPEATS)]
            times[wanted] = _milliseconds(call)
    differs = max(float((a - b).norm() / b.norm()) for a, b in zip(found[True][0], found[False][0], strict=True))
    repeats = all(torch.equal(a, b) for again in found[True] for a, b in zip(again, found[True][0], strict=True))
    print(f"depth {depth} dim {dim} chunk {chunk}, expansion 2: {times[False]:.3f} ms with the state in L2, "
          f"{times[True]:.3f} ms in registers, {differs:.1e} apart, repeats: {repeats}", flush=True)  # fmt: skip
    return times[True] < times[False] and differs < MOST_APART and repeats


class _instead:
    """One entry of a table, changed for a while."""

    def __init__(self, architecture: str, key: tuple[str, int, int, int], launch: Launch) -> None:
        self.table, self.key, self.launch = table_of(architecture), key, launch

    def __enter__(self) -> None:
        self.usual, self.table[self.key] = self.table[self.key], self.launch

    def __exit__(self, *_: object) -> None:
        self.table[self.key] = self.usual


def _training_call(
    depth: int, dim: int, chunk: int, expansion: int = EXPANSION
) -> functools.partial[tuple[torch.Tensor, ...]]:
    shape, device = (8, 4096, 16), torch.device("cuda")
    q, k, v = (torch.randn(*shape, dim, device=device, dtype=torch.bfloat16) for _ in range(3))
    sizes = [(dim, dim)] if depth == 1 else [(dim, expansion * dim), (expansion * dim, dim)]
    weights = [torch.randn(8, 16, *size, device=device) * size[0] ** -0.5 for size in sizes]
    given = {
        "weights": weights,
        "momentum": [torch.zeros_like(w) for w in weights],
        "alpha": torch.rand(shape, device=device) * 0.02,
        "eta": torch.rand(shape, device=device) * 0.9,
        "theta": torch.rand(shape, device=device) / chunk,
        "norm": (torch.ones(16, dim, device=device), torch.zeros(16, dim, device=device)),
    }
    q, k = F.normalize(q, dim=-1).requires_grad_(), F.normalize(k, dim=-1).requires_grad_()
    return functools.partial(_train, q, k, v.requires_grad_(), chunk, given)


def _train(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunk: int, given: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    """Outputs, the state after and the gradients."""
    y, weights, momentum = chunked_memory(q, k, v, chunk_size=chunk, **given)
    return (y, *weights, *momentum, *torch.autograd.grad(y, (q, k, v), torch.ones_like(y)))


def _milliseconds(call: functools.partial[Any], runs: int = 5) -> float:
    call()
    times = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", action="store_true", help="time the candidates on this machine's GPU")
    if parser.parse_args().time:
        if not torch.cuda.is_available():
            parser.exit(2, "no CUDA device is here to time on; without --time the table comes from the compiler\n")
        by_timing()
    else:
        by_compiling()


if __name__ == "__main__":
    main()
