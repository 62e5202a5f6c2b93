"""The plain memories through torch.compile: one compiled function for some chunks, and autograd goes through it.

The same numbers as `fused`, faster once it is compiled. That takes up to a minute for each new shape, or some seconds
where torch's cache on disk has it, and on CPUs a C++ compiler.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from titans_dist.memory.activations import ACTIVATIONS
from titans_dist.memory.fused import gated
from titans_dist.memory.gates import ChunkGates
from titans_dist.memory.network import Norm, descent, output
from titans_dist.memory.spec import MemorySpec
from titans_dist.memory.writes import Carry, Pairs

CHUNKS = 4
"""Chunks compiled as one function: each call of it takes as long as some products. What is left over goes singly."""
_OPTIONS: dict[str, Any] = {"cpp_wrapper": True}  # the products are called from C++: a tenth of the time on CPUs


def write_and_read(
    spec: MemorySpec, q: Tensor, pairs: Pairs, gates: ChunkGates, seen: ChunkGates, norm: Norm | None, carry: Carry
) -> tuple[Tensor, Carry]:
    """f(W_t; q_t) for q (N, G, b, D), and the memory after all chunks, from a state between two chunks.

    For the memories of `fused.write_and_read`.
    """
    together, m = _compiled_chunks(spec), len(carry.slots[0])
    states = [torch.cat(layer, 1) for layer in carry.slots]
    tensors = (q, pairs.k, pairs.v, pairs.delta, gates.keep, gates.add, seen.past, seen.write)
    each = [[None] * len(q) if x is None else x.unbind(0) for x in tensors]
    chunks, outputs = list(zip(*each, strict=True)), []
    while chunks:
        count = CHUNKS if len(chunks) >= CHUNKS else 1
        ys, states = together(chunks[:count], norm, states)
        outputs += ys
        chunks = chunks[count:]
    return torch.stack(outputs), Carry([list(x.chunk(m, 1)) for x in states], None, None, 0)


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled for each shape it is given; the same for all layers."""
    return torch.compile(function, dynamic=False, options=_OPTIONS)


@functools.cache
def _compiled_chunks(spec: MemorySpec) -> Callable[..., tuple[list[Tensor], list[Tensor]]]:
    def together(
        chunks: list[tuple[Any, ...]], norm: Norm | None, states: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        outputs = []
        for chunk in chunks:
            y, states = _chunk(spec, norm, states, *chunk)
            outputs.append(y)
        return outputs, states

    return torch.compile(together, dynamic=False, options=_OPTIONS)


def _chunk(
    spec: MemorySpec,
    norm: Norm | None,
    states: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor | None,
    keep: Tensor,
    add: Tensor,
    past: Tensor,
    write: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """One chunk's writes and reads; q, k, v (G, b, D), gates as `ChunkGates` has them, states (G, m d_in, d_out).

    The slots of a layer lie below each other: what acts on all of them is one product.
    """
    m, weights = keep.shape[-1], [x.chunk(keep.shape[-1], 1)[0] for x in states]
    with_slope = _gelu if spec.activation == "gelu" else ACTIVATIONS[spec.activation].with_slope
    inputs, deltas = descent(spec, weights, k, v, delta, norm, with_slope)
    x, after = q, []
    for i, (state, a, d) in enumerate(zip(states, inputs, deltas, strict=True)):
        if i:
            x = with_slope(x)[0]
        z = gated(past, x) @ state
        x = z if write is None else z + (write * (x @ a.mT)) @ d
        slots = state.unflatten(1, (m, -1))
        mixed = [sum(keep[:, r, c, None, None] * slots[:, c] for c in range(r, m)) for r in range(m)]
        after.append((torch.stack(mixed, 1) + (gated(add, a).mT @ d).view_as(slots)).flatten(1, 2))
    return output(spec, q, x, norm), after


def _gelu(z: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(z) and its slope, in operations that the compiler sees through."""
    below = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
    return z * below, below + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
