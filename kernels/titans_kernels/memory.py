"""The chunked memory: chunks, gates, writes and reads as kernels, with a backward pass of kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_kernels.activation import ACTIVATIONS
from titans_kernels.descent import LOSSES
from titans_kernels.device import on_device_of
from titans_kernels.gates import READS
from titans_kernels.launch import Chunks, Inputs, Shape, Work, backward, gates, read, write

LARGEST_HEAD = 128
LARGEST_TILE = {torch.bfloat16: 64 * 128, torch.float32: 64 * 64}
"""Padded head dimension times chunk: what registers and shared memory have room for."""


def chunked_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    weights: Sequence[Tensor],
    momentum: Sequence[Tensor] = (),
    alpha: Tensor | None = None,
    eta: Tensor | None = None,
    theta: Tensor,
    limit: Tensor | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
    starts: Tensor | None = None,
    begin: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    chunk_size: int,
    read: str = "after",
    activation: str = "gelu",
    loss: str = "l2",
    recompute: bool = True,
    largest: Callable[[], Tensor | None] | None = None,
    group_size: int = 512,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Write every (k, v) into an MLP memory that learns at test time, and read it with q (Titans, eqs 12-18).

    q, k, v: (B, T, H, D), float32 or bfloat16, any strides. alpha (share forgotten; None: nothing is), eta (momentum
    kept), theta (inner learning rate), limit (where loss "huber" becomes linear): (B, T, H).
    weights, momentum: the state before the first token, (B, H, d_in, d_out) for each of one or two layers; no
    `momentum`, and there is none. norm: gain and bias (H, D) of f(x) = x + LayerNorm(MLP(x)); else f is the MLP.
    starts: (B, T) bool, tokens before which the state becomes `begin`, a pair like (weights, momentum).
    chunk_size: tokens whose inner gradients are taken at the same memory. read: "after" or "before" a token's own
    write, or at the chunk's "start". activation: "gelu", "silu", "relu" or "identity". loss: "l2", "dot" or "huber".
    recompute: keep for the backward pass one state per segment of the sequence, not one per chunk.
    largest: called in the backward pass; the largest norm (B H,) the state's adjoint may have between two groups of
    `group_size` tokens, a multiple of the chunk's, or None.

    Returns y (B, T, H, D) in q's dtype, and weights and momentum after the last token in float32. Products have
    operands of q's dtype (float32 ones in three tf32 parts) and float32 sums. The same inputs give the same bits.
    Raises ValueError for what `unsupported` names.
    """
    batch, length, heads, dim = q.shape
    reason = unsupported(q.dtype, dim, len(weights), chunk_size, activation, loss, read)
    if reason is not None:
        raise ValueError(f"the Triton kernels have no {reason}")
    shape = Shape(
        batch, length, heads, dim, weights[0].shape[-1] if len(weights) == 2 else dim, len(weights), bool(momentum),
        norm is not None, alpha is not None, loss, activation, read, chunk_size, q.dtype, q.device,
    )  # fmt: skip
    chunks = chunk_table(starts, batch, length, chunk_size, group_size, q.device)
    others = [] if starts is None or begin is None else _interleaved(*begin)

    def precise(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.float().contiguous()

    gain, bias = (None, None) if norm is None else (x.float().expand(heads, dim).contiguous() for x in norm)
    with on_device_of(q):
        y, *after = _ChunkedMemory.apply(
            shape, chunks, recompute, largest, q.contiguous(), k.contiguous(), v.contiguous(),
            precise(alpha), precise(eta) if momentum else None, precise(limit) if loss == "huber" else None,
            precise(theta), gain, bias, *_interleaved(weights, momentum), *others,
        )  # fmt: skip
    slots = 2 if momentum else 1
    return y, after[::slots], after[1::2] if momentum else []


def unsupported(
    dtype: torch.dtype, head_dim: int, depth: int, chunk_size: int, activation: str, loss: str, read: str
) -> str | None:
    """What the kernels do not have, in words that follow "no", or None."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"form for {str(dtype).removeprefix('torch.')}: use float32 or bfloat16"
    if not 1 <= depth <= 2:
        return f"form for memories of {depth} layers: use 1 or 2"
    if head_dim > LARGEST_HEAD:
        return f"form for heads of {head_dim} dimensions: use {LARGEST_HEAD} or fewer"
    largest = LARGEST_TILE[dtype] // (64 if head_dim <= 64 else 128)
    if chunk_size > largest:
        what = f"form for chunks of {chunk_size} tokens of heads of {head_dim} in {str(dtype).removeprefix('torch.')}"
        return f"{what}: use chunks of {largest} or fewer"
    for name, given, known in (("activation", activation, ACTIVATIONS), ("loss", loss, LOSSES), ("read", read, READS)):
        if given not in known:
            return f"{name} {given!r}: use {', '.join(known)}"
    return None


def chunk_table(
    starts: Tensor | None, batch: int, length: int, chunk_size: int, group_size: int, device: torch.device
) -> Chunks:
    """Chunks of `chunk_size` tokens on the sequence's grid, cut where documents start (`starts` (B, T) bool).

    With `starts` the host waits for the device once: how many chunks there are.
    """
    if starts is None:
        begins = torch.arange(0, length, chunk_size, dtype=torch.int32, device=device)
        flags = ((begins > 0) & (begins % group_size == 0)).int() * 2
        each = (begins, (length - begins).clamp_max(chunk_size), flags)
        return Chunks(*(x.expand(batch, -1).contiguous() for x in each))
    token = torch.arange(length, dtype=torch.int32, device=device).expand(batch, -1)
    is_first = starts | (token % chunk_size == 0)
    index = is_first.cumsum(1)
    most = int(index[:, -1].max())
    begins = torch.full((batch, most + 1), length, dtype=torch.int32, device=device)
    begins.scatter_(1, torch.where(is_first, index - 1, most), token)
    begins[:, most] = length
    lengths, begins = begins.diff(dim=1), begins[:, :most].contiguous()
    resets = F.pad(starts, (0, 1)).gather(1, begins.long())
    borders = (begins > 0) & (begins < length) & (begins % group_size == 0)
    return Chunks(begins, lengths, resets.int() + 2 * borders.int())


def _interleaved(weights: Sequence[Tensor], momentum: Sequence[Tensor]) -> list[Tensor]:
    """W and S of the first layer, W and S of the next."""
    return [x for layer in zip(*filter(None, (weights, momentum)), strict=True) for x in layer]


class _ChunkedMemory(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        shape: Shape,
        chunks: Chunks,
        recompute: bool,
        largest: Callable[[], Tensor | None] | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        inputs, slots = Inputs(*tensors[:9]), [x for x in tensors[9:] if x is not None]  # type: ignore[arg-type]
        flat = [x.float().flatten(0, 1).contiguous() for x in slots]
        state, begin = [x.clone() for x in flat[: shape.slots]], flat[shape.slots :]
        y = torch.empty_like(inputs.q)
        raw = torch.empty_like(y) if shape.residual else y
        kept: list[Tensor] = []
        for segment in shape.segments(chunks.count):
            if recompute:
                kept += [x.clone() for x in state]
            of_segment = gates(shape, inputs, chunks, segment)
            work = write(shape, inputs, chunks, segment, of_segment, state, begin)
            read(shape, inputs, chunks, segment, of_segment, work, y, raw)
            if not recompute:
                kept += [*work.states, work.outputs, work.descents]
        ctx.save_for_backward(*tensors[:9], raw, *begin, *kept)  # all of it: checkpointing drops what is saved, only
        ctx.shape, ctx.chunks, ctx.largest, ctx.recompute, ctx.begins = shape, chunks, largest, recompute, len(begin)
        ctx.set_materialize_grads(False)
        return (y, *(shape.apart(x) for x in state))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_y: Tensor | None, *g_ends: Tensor | None) -> tuple[Any, ...]:
        shape, chunks = ctx.shape, ctx.chunks
        saved = list(ctx.saved_tensors)
        tensors, raw, begin, kept = saved[:9], saved[9], saved[10 : 10 + ctx.begins], saved[10 + ctx.begins :]
        segments = shape.segments(chunks.count)
        each = len(kept) // len(segments)
        inputs = Inputs(*tensors)
        g_y = torch.zeros_like(inputs.q) if g_y is None else g_y.to(inputs.q.dtype).contiguous()
        grads = Inputs(*(None if x is None else torch.empty_like(x) for x in tensors))  # type: ignore[arg-type]
        for x in (grads.gain, grads.bias):
            if x is not None:
                x.zero_()
        ends = [x[:, 0].zero_() for x in shape.new_slots(1, torch.float32)]
        for x, g in zip(ends, g_ends, strict=True):
            if g is not None:
                x.copy_(g.flatten(0, 1))
        g_begin = [torch.zeros_like(x) for x in begin]
        largest = None if ctx.largest is None else ctx.largest()
        largest = None if largest is None else largest.float().contiguous()
        for i in reversed(range(len(segments))):
            segment, of_this = segments[i], kept[i * each : (i + 1) * each]
            of_segment = gates(shape, inputs, chunks, segment)
            if ctx.recompute:
                state = [x.clone() for x in of_this]
                work = write(shape, inputs, chunks, segment, of_segment, state, begin)
            else:
                *states, outputs, descents = of_this
                work = Work(states, outputs, descents)
            backward(shape, inputs, chunks, segment, of_segment, work, raw, g_y, largest, grads, ends, g_begin)
        return (*[None] * 4, *grads.tensors(), *(shape.apart(x) for x in (*ends, *g_begin)))
