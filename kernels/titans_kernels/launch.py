"""The launches of one call of the memory: a segment's gates, writes and reads, and the same backward.

Every per-chunk buffer is one segment's, (B H, count, ...). What a memory does not have (momentum, a first layer, a
norm) is None in its place.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from titans_kernels.gates import gates_backward_kernel, gates_kernel
from titans_kernels.read import read_kernel
from titans_kernels.read_backward import queries_backward_kernel, reads_backward_kernel
from titans_kernels.table import Launch, launch_of
from titans_kernels.write import write_kernel
from titans_kernels.write_backward import write_backward_kernel

WORKSPACE_BYTES = 2**30
"""About how much of a segment may be in memory at once, backward: more chunks at a time are more programs at a time."""
GATE_PROGRAMS = 2048
SMALLEST = Launch(block=16, warps=8)
HIDDEN_KINDS = 6
"""Hidden numbers of a chunk's tokens that the kernels of the backward pass hand on."""
Slots = Sequence[Tensor]
"""W1, S1, W2, S2 as far as the memory has them, (B H, d_in, d_out) or (B H, count, d_in, d_out)."""
Segment = tuple[int, int]
"""The first of some chunks, and how many they are."""


@dataclass
class Inputs:
    """q, k, v (B, T, H, D), gates and limit (B, T, H), gain and bias (H, D); all contiguous. Also their gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    alpha: Tensor | None
    eta: Tensor | None
    limit: Tensor | None
    theta: Tensor
    gain: Tensor | None
    bias: Tensor | None

    def tensors(self) -> list[Tensor | None]:
        return [getattr(self, field.name) for field in fields(self)]


@dataclass
class Chunks:
    """begins, lengths, flags (B, N) int32: the chunks of each sequence; the last ones of a row may be empty.

    Flags: 1 where the state begins anew, 2 where a group of chunks begins after another.
    """

    begins: Tensor
    lengths: Tensor
    flags: Tensor

    @property
    def count(self) -> int:
        """Chunks of the sequence that has most."""
        return self.begins.shape[1]


@dataclass
class Gates:
    """See `gates_kernel`."""

    write: Tensor
    past: Tensor
    add: Tensor
    keep: Tensor


@dataclass
class Work:
    """The state each chunk began with, in the dtype of the products; outputs and descents as in `write_kernel`."""

    states: list[Tensor]
    outputs: Tensor
    descents: Tensor


@dataclass(frozen=True)
class Shape:
    """What the kernels are compiled for and launched with."""

    batch: int
    length: int
    heads: int
    head_dim: int
    hidden: int
    depth: int
    momentum: bool
    residual: bool
    forgets: bool
    loss: str
    activation: str
    read: str
    chunk_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def rows(self) -> int:
        return self.batch * self.heads

    @property
    def chunk(self) -> int:
        """Rows of a tile."""
        return max(16, 1 << (self.chunk_size - 1).bit_length())

    @property
    def dim(self) -> int:
        """Columns of a tile."""
        return max(16, 1 << (self.head_dim - 1).bit_length())

    @property
    def slots(self) -> int:
        """Matrices of a state."""
        return self.depth * (2 if self.momentum else 1)

    def segments(self, chunks: int) -> list[Segment]:
        """Chunks whose states are in memory together."""
        states = 2 * self.slots * self.head_dim * self.hidden  # and their gradients
        hidden = HIDDEN_KINDS * self.chunk * self.hidden if self.depth == 2 else 0
        of_chunk = self.rows * (states + hidden) * self.dtype.itemsize
        count = max(1, WORKSPACE_BYTES // of_chunk)
        return [(first, min(count, chunks - first)) for first in range(0, chunks, count)]

    def apart(self, x: Tensor) -> Tensor:
        """(B H, ...) -> (B, H, ...)."""
        return x.unflatten(0, (self.batch, self.heads))

    def four(self, given: Slots) -> list[Tensor | None]:
        """W1, S1, W2, S2, None where there is none."""
        if not given:
            return [None] * 4
        slots: list[Tensor | None] = list(given)
        if not self.momentum:
            slots = [x for w in given for x in (w, None)]
        return slots if self.depth == 2 else [None, None, *slots]

    def new_slots(self, count: int, dtype: torch.dtype) -> list[Tensor]:
        """Room for `count` states of every row."""
        sizes = [(self.head_dim, self.hidden), (self.hidden, self.head_dim)][-self.depth :]
        return [self.new(count, *size, dtype=dtype) for size in sizes for _ in range(2 if self.momentum else 1)]

    def new(self, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Room for something of every row."""
        return torch.empty(self.rows, *sizes, dtype=dtype, device=self.device)

    def options(self, kernel: str) -> dict[str, object]:
        """Compile-time arguments of a kernel that all of them have, and how it is launched."""
        launch = launch_of(kernel, self.depth, self.dim, self.chunk, self.device)
        if self.dtype == torch.float32:  # in three parts operands take three times the room
            launch = SMALLEST
        block = self.dim if self.depth == 1 else launch.block
        return {
            "HEAD": self.head_dim, "HIDDEN": self.hidden, "DIM": self.dim, "BLOCK": block, "CHUNK": self.chunk,
            "DEPTH": self.depth, "MOMENTUM": self.momentum, "ACTIVATION": self.activation,
            "PRECISION": "tf32x3",  # of float32 operands; as exact as they are
            "num_warps": launch.warps, "num_stages": launch.stages,
        }  # fmt: skip


def _sequential(shape: Shape, kernel: str) -> tuple[Any, dict[str, object]]:
    """The kernel of a sequential pass, "write" or "write_backward", and its compile-time arguments.

    The table says whether it is the one with the state in registers. That one is written in Gluon, which lives in
    `triton.experimental`: nothing else depends on it.
    """
    options = shape.options(kernel)
    if launch_of(kernel, shape.depth, shape.dim, shape.chunk, shape.device).resident:
        resident = importlib.import_module(f"titans_kernels.{kernel}_resident")
        if resident.supports(shape.dtype, shape.head_dim, shape.hidden, shape.depth, shape.chunk):
            return getattr(resident, f"{kernel}_resident_kernel"), options | {"num_warps": resident.WARPS}
    return (write_kernel if kernel == "write" else write_backward_kernel), options


def gates(shape: Shape, x: Inputs, chunks: Chunks, segment: Segment) -> Gates:
    first, count = segment
    b = shape.chunk
    found = Gates(shape.new(count, b, b), shape.new(count, 2, b), shape.new(count, 2, b), shape.new(count, 4))
    gates_kernel[(count, shape.rows)](
        x.alpha, x.eta, x.theta, chunks.begins, chunks.lengths, found.write, found.past, found.add, found.keep,
        shape.length, shape.heads, chunks.count, first, count,
        CHUNK=b, FORGETS=shape.forgets, MOMENTUM=shape.momentum, READ=shape.read, num_warps=1,
    )  # fmt: skip
    return found


def write(shape: Shape, x: Inputs, chunks: Chunks, segment: Segment, gates: Gates, state: Slots, begin: Slots) -> Work:
    """Writes a segment into `state`, in place. begin: what documents begin with, or nothing."""
    first, count = segment
    of_tokens = count, shape.chunk, shape.head_dim
    work = Work(shape.new_slots(count, shape.dtype), shape.new(*of_tokens), shape.new(*of_tokens, dtype=shape.dtype))
    kernel, options = _sequential(shape, "write")
    kernel[(shape.rows,)](
        x.k, x.v, x.limit, chunks.begins, chunks.lengths, chunks.flags, gates.add, gates.keep, x.gain, x.bias,
        *shape.four(state), *shape.four(begin), *shape.four(work.states), work.outputs, work.descents,
        shape.length, shape.heads, chunks.count, first, count,
        **options, RESIDUAL=shape.residual, LOSS=shape.loss, STARTS=bool(begin),
    )  # fmt: skip
    return work


def read(
    shape: Shape, x: Inputs, chunks: Chunks, segment: Segment, gates: Gates, work: Work, y: Tensor, raw: Tensor
) -> None:
    """Reads a segment into y and, before the norm, raw (B, T, H, D)."""
    first, count = segment
    read_kernel[(count, shape.rows)](
        x.q, x.k, work.descents, chunks.begins, chunks.lengths, gates.write, gates.past, x.gain, x.bias,
        *shape.four(work.states), y, raw,
        shape.length, shape.heads, chunks.count, first, count,
        **shape.options("read"), RESIDUAL=shape.residual,
    )  # fmt: skip


def backward(
    shape: Shape, x: Inputs, chunks: Chunks, segment: Segment, gates: Gates, work: Work, raw: Tensor, g_y: Tensor,
    largest: Tensor | None, grads: Inputs, g_state: Slots, g_begin: Slots,
) -> None:  # fmt: skip
    """Fills `grads` at the segment's tokens, adds to gain's and bias's, and takes g_state from its end to its start."""
    first, count = segment
    b, dim, hidden = shape.chunk, shape.head_dim, shape.hidden
    at_starts = shape.new_slots(count, shape.dtype)
    g_queries, g_keys, g_descents = (shape.new(count, b, dim) for _ in range(3))
    g_raw, g_outputs = (shape.new(count, b, dim, dtype=shape.dtype) for _ in range(2))
    of_units: list[Tensor | None] = [None] * HIDDEN_KINDS
    if shape.depth == 2:
        of_units = [shape.new(count, b, hidden, dtype=shape.dtype) for _ in range(HIDDEN_KINDS)]
    inner, pulled, queried, g_inner, g_inputs, g_hidden = of_units
    g_write, g_past = shape.new(count, b, b), shape.new(count, 2, b)
    g_add, g_keep = shape.new(count, 2, b), shape.new(count, 4)
    g_gain, g_bias = (shape.new(count, dim), shape.new(count, dim)) if shape.residual else (None, None)
    tables = chunks.begins, chunks.lengths
    sizes = shape.length, shape.heads, chunks.count, first, count
    queries_backward_kernel[(count, shape.rows)](
        g_y, x.q, x.k, work.descents, raw, *tables, gates.write, gates.past, gates.keep, x.gain,
        *shape.four(work.states), g_queries, g_past, g_gain, g_bias, g_raw, inner, pulled, queried, g_inner,
        *sizes, **shape.options("queries_backward"), RESIDUAL=shape.residual,
    )  # fmt: skip
    reads_backward_kernel[(count, shape.rows)](
        x.q, x.k, work.descents, *tables, gates.write, gates.past, inner, pulled, queried, g_inner, g_raw, g_queries,
        grads.q, g_keys, g_descents, g_inputs, g_hidden, g_write, *shape.four(at_starts),
        *sizes, **shape.options("reads_backward"),
    )  # fmt: skip
    kernel, options = _sequential(shape, "write_backward")
    kernel[(shape.rows,)](
        x.k, x.v, x.limit, work.outputs, work.descents, *tables, chunks.flags, gates.add, gates.keep, x.gain, x.bias,
        largest, *shape.four(work.states), *shape.four(at_starts), *shape.four(g_state), *shape.four(g_begin),
        g_keys, grads.k, grads.v, grads.limit, g_descents, g_outputs, inner, pulled, g_inputs, g_hidden, g_add, g_keep,
        g_gain, g_bias, *sizes, **options, RESIDUAL=shape.residual, LOSS=shape.loss,
        STARTS=bool(g_begin), LIMITED=largest is not None,
    )  # fmt: skip
    total = shape.rows * count
    programs = min(total, GATE_PROGRAMS)
    scratch = torch.empty(programs, 2 * b + 4, b, device=shape.device)
    gates_backward_kernel[(programs,)](
        x.alpha, x.eta, x.theta, *tables, g_write, g_past, g_add, g_keep, grads.alpha, grads.eta, grads.theta, scratch,
        *sizes, total, CHUNK=b, FORGETS=shape.forgets, MOMENTUM=shape.momentum, READ=shape.read, num_warps=1,
    )  # fmt: skip
    for total_sum, part in ((grads.gain, g_gain), (grads.bias, g_bias)):
        if total_sum is not None and part is not None:
            total_sum += part.view(shape.batch, shape.heads, count, dim).sum((0, 2))
