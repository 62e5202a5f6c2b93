# mypy: disable-error-code="no-untyped-def, assignment"
# ruff: noqa: RUF005, SIM102  (Triton unpacks no tuples, and works out both sides of `and`)
"""Causal depthwise convolution over time, SiLU, and every head at length 1, in one kernel.

A program walks over a chunk of the tokens of a few heads, a token at a time, and keeps the last tokens in registers:
every input is read once, and the gradient needs nothing but the inputs. All arithmetic is in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_kernels.ahead_of_time import Configuration
from titans_kernels.device import on_device_of
from titans_kernels.sigmoid import sigmoid

CHUNK = 64  # tokens a program writes; it reads kernel - 1 more forward and twice as many backward
WARPS = 4  # of a program


def short_conv(
    x: Tensor,
    past: Tensor,
    weight: Tensor,
    head_dim: int,
    unit: bool,
    starts: Tensor | None = None,
    begin: Tensor | None = None,
) -> Tensor:
    """SiLU of y_t = sum_i weight[:, K - 1 - i] x_{t - i}, (B, T, C) -> (B, T, C / head_dim, head_dim).

    past (B or 1, K - 1, C): the tokens before `x`; weight (C, K); unit: bring every head to length 1.
    starts (B, T): tokens that begin a document; before it lies `begin` (1, K - 1, C) instead of other tokens.
    """
    if (starts is None) != (begin is None):
        raise ValueError("starts and begin come together: the documents' first tokens, and what lies before them")
    if weight.shape[1] > CHUNK // 2:
        raise ValueError(f"the kernel has {weight.shape[1]} taps, at most {CHUNK // 2} are supported")
    with on_device_of(x):
        return _ShortConv.apply(x, past, weight, begin, starts, head_dim, unit)


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        past: Tensor,
        weight: Tensor,
        begin: Tensor | None,
        starts: Tensor | None,
        head_dim: int,
        unit: bool,
    ) -> Tensor:
        x, past, weight = x.contiguous(), past.contiguous(), weight.contiguous()
        begin = None if begin is None else begin.contiguous()
        starts = None if starts is None else starts.contiguous().view(torch.uint8)
        ctx.save_for_backward(x, past, weight, begin, starts)
        ctx.head_dim, ctx.unit = head_dim, unit
        batch, length, channels = x.shape
        y = x.new_empty(batch, length, channels // head_dim, head_dim)
        programs, constants, num_warps = _launch(x, weight.shape[1], head_dim, unit)
        _forward_kernel[programs](
            x,
            past,
            weight,
            begin,
            starts,
            y,
            length,
            channels // head_dim,
            _stride(past),
            **constants,
            num_warps=num_warps,
        )
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, past, weight, begin, starts = ctx.saved_tensors
        (batch, length, channels), kernel = x.shape, weight.shape[1]
        programs, constants, num_warps = _launch(x, kernel, ctx.head_dim, ctx.unit)
        chunks = triton.cdiv(length, CHUNK)
        g_x = torch.empty_like(x)
        g_past = x.new_empty(batch, kernel - 1, channels, dtype=torch.float32)
        # A program's share each, summed afterwards: the order of the sum, and so the result, is always the same.
        g_weight = x.new_empty(batch * chunks, kernel, channels, dtype=torch.float32)
        g_begin = None if begin is None else x.new_empty(batch * chunks, kernel - 1, channels, dtype=torch.float32)
        _backward_kernel[programs](
            x,
            past,
            weight,
            begin,
            starts,
            grad.contiguous(),
            g_x,
            g_past,
            g_weight,
            g_begin,
            length,
            channels // ctx.head_dim,
            _stride(past),
            **constants,
            num_warps=num_warps,
        )
        if past.shape[0] == 1:
            g_past = g_past.sum(0, keepdim=True)
        return (
            g_x,
            g_past.to(past.dtype),
            g_weight.sum(0).T.to(weight.dtype).contiguous(),
            None if g_begin is None else g_begin.sum(0, keepdim=True).to(begin.dtype),
            None,
            None,
            None,
        )


def _stride(past: Tensor) -> int:
    """From a sequence's past to that of the next."""
    return 0 if past.shape[0] == 1 else past.stride(0)


def _launch(x: Tensor, kernel: int, head_dim: int, unit: bool) -> tuple[tuple[int, int], dict[str, Any], int]:
    """Number of programs, constants, warps."""
    batch, length, channels = x.shape
    constants, num_warps = _constants(channels // head_dim, head_dim, kernel, unit, x.element_size())
    blocks = triton.cdiv(channels // head_dim, constants["BLOCK_HEADS"])
    return (blocks * triton.cdiv(length, CHUNK), batch), constants, num_warps


def _constants(heads: int, head_dim: int, kernel: int, unit: bool, element_size: int) -> tuple[dict[str, Any], int]:
    """What the kernels are compiled for, and their warps."""
    of_a_thread = 16 // element_size  # the largest load
    if kernel > 4:  # the registers of a thread hold no more
        of_a_thread //= 2
    padded = triton.next_power_of_2(head_dim)
    block_heads = min(triton.next_power_of_2(heads), max(1, WARPS * 32 * of_a_thread // padded))
    constants = {
        "KERNEL": kernel,
        "UNIT": unit,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded,
        "BLOCK_HEADS": block_heads,
        "CHUNK": CHUNK,
    }
    return constants, max(1, block_heads * padded // (32 * of_a_thread))


def configurations() -> Iterator[Configuration]:
    """For 1024 channels. In float32 only the form that needs most, with documents and heads of unit length."""
    for dtype, head_dim, unit, documents in product(("bf16", "fp32"), (64, 96, 128), (True, False), (True, False)):
        if dtype == "fp32" and not (unit and documents):
            continue
        constants, num_warps = _constants(1024 // head_dim, head_dim, 4, unit, 2 if dtype == "bf16" else 4)
        pointer, sums = f"*{dtype}", "*fp32"
        types = {
            "x": pointer,
            "past": pointer,
            "weight": pointer,
            "length": "i32",
            "heads": "i32",
            "past_stride": "i32",
        }
        given = {"begin": pointer, "starts": "*u8"}
        gradients = {"g_y": pointer, "g_x": pointer, "g_past": sums, "g_weight": sums}
        for kind, kernel, more, of_documents in (
            ("forward", _forward_kernel, {"y": pointer}, given),
            ("backward", _backward_kernel, gradients, {**given, "g_begin": sums}),
        ):
            yield Configuration(
                f"short_conv {kind} {dtype} head_dim={head_dim}{' unit' * unit}{' documents' * documents}",
                kernel,
                {**types, **more, **(of_documents if documents else {})},
                {**constants, **({} if documents else dict.fromkeys(of_documents))},
                num_warps,
                divisible=frozenset({"past_stride"}),
            )


@triton.jit
def _forward_kernel(
    x,
    past,
    weight,
    begin,
    starts,
    y,
    length,
    heads,
    past_stride,
    KERNEL: tl.constexpr,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    REACH: tl.constexpr = KERNEL - 1
    channels = heads * HEAD_DIM
    channel, inside, first = _place(heads, HEAD_DIM, PADDED_DIM, BLOCK_HEADS, CHUNK)
    last = tl.minimum(first + CHUNK, length)
    row = tl.program_id(1).to(tl.int64) * length
    taps = _taps(weight, channel, inside, KERNEL)
    before = _rows(past + tl.program_id(1).to(tl.int64) * past_stride, channel, inside & (first == 0), channels, REACH)
    # The tokens before the chunk are walked over as well: they fill `before`, and a document may start among them.
    token = tl.maximum(first - REACH, 0)
    following = tl.load(x + (row + token) * channels + channel, mask=inside, other=0.0)
    for t in range(token, last):
        now = following.to(tl.float32)
        following = tl.load(x + (row + t + 1) * channels + channel, mask=inside & (t + 1 < last), other=0.0)
        if starts is not None:
            if tl.load(starts + row + t) != 0:
                before = _rows(begin, channel, inside, channels, REACH)
        mixed = _mixed(now, before, taps, REACH)
        out = mixed * sigmoid(mixed)
        if UNIT:
            out *= _inverse_length(out)[:, None]
        tl.store(y + (row + t) * channels + channel, out.to(y.dtype.element_ty), mask=inside & (t >= first))
        before = ((now,) + before)[:REACH]


@triton.jit
def _backward_kernel(
    x,
    past,
    weight,
    begin,
    starts,
    g_y,
    g_x,
    g_past,
    g_weight,
    g_begin,
    length,
    heads,
    past_stride,
    KERNEL: tl.constexpr,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    REACH: tl.constexpr = KERNEL - 1
    channels = heads * HEAD_DIM
    channel, inside, first = _place(heads, HEAD_DIM, PADDED_DIM, BLOCK_HEADS, CHUNK)
    last = tl.minimum(first + CHUNK, length)
    batch = tl.program_id(1).to(tl.int64)
    row = batch * length
    taps = _taps(weight, channel, inside, KERNEL)
    before = _rows(past + batch * past_stride, channel, inside & (first == 0), channels, REACH)
    zero = tl.zeros([BLOCK_HEADS, PADDED_DIM], tl.float32)
    g_before = (zero,) * REACH  # what the tokens of `before` have of their gradients so far
    g_taps = (zero,) * KERNEL
    g_begins = (zero,) * REACH
    since = tl.full([], REACH, tl.int32)  # how many tokens ago the document began, at most REACH
    token = tl.maximum(first - REACH, 0)
    following = tl.load(x + (row + token) * channels + channel, mask=inside, other=0.0)
    g_following = tl.load(g_y + (row + token) * channels + channel, mask=inside, other=0.0)
    # A token's gradient is whole only REACH tokens later. What is not there has a gradient of 0.
    for t in range(token, last + REACH):
        now, g_out = following.to(tl.float32), g_following.to(tl.float32)
        there = inside & (t + 1 < length)
        following = tl.load(x + (row + t + 1) * channels + channel, mask=there, other=0.0)
        g_following = tl.load(g_y + (row + t + 1) * channels + channel, mask=there, other=0.0)
        if starts is not None:
            since = tl.minimum(since + 1, REACH)
            if tl.load(starts + row + t, mask=t < length, other=0) != 0:
                before = _rows(begin, channel, inside, channels, REACH)
                since = tl.full([], 0, tl.int32)

        mixed = _mixed(now, before, taps, REACH)
        opened = sigmoid(mixed)
        if UNIT:
            out = mixed * opened
            inverse = _inverse_length(out)
            # Where the length is raised to 1e-12, it is a constant.
            along = tl.where(inverse < 9.99e11, tl.sum(g_out * out, 1) * inverse * inverse, 0.0)
            g_out = (g_out - out * along[:, None]) * inverse[:, None]
        g_mixed = g_out * opened * (1.0 + mixed * (1.0 - opened))

        own = tl.where((t >= first) & (t < last), g_mixed, 0.0)
        reached = (now,) + before
        g_taps = _multiplied_and_added(g_taps, own, reached, KERNEL)
        g_reached = (zero,) + g_before
        if starts is not None:
            if since < REACH:
                g_begins = _added_to_begin(g_begins, own, taps, since, REACH)
                g_reached = _added_since(g_reached, g_mixed, taps, since, KERNEL)
            else:
                g_reached = _multiplied_and_added(g_reached, g_mixed, taps, KERNEL)
        else:
            g_reached = _multiplied_and_added(g_reached, g_mixed, taps, KERNEL)

        done = t - REACH
        whole = g_reached[REACH]
        at = g_x + (row + done) * channels + channel
        tl.store(at, whole.to(g_x.dtype.element_ty), mask=inside & (done >= first))
        if done < 0:
            tl.store(g_past + (batch * REACH + t) * channels + channel, whole, mask=inside)
        g_before = g_reached[:REACH]
        before = reached[:REACH]

    share = batch * tl.cdiv(length, CHUNK) + first // CHUNK
    for i in tl.static_range(KERNEL):
        tl.store(g_weight + (share * KERNEL + REACH - i) * channels + channel, g_taps[i], mask=inside)
    if starts is not None:
        for i in tl.static_range(REACH):
            tl.store(g_begin + (share * REACH + REACH - 1 - i) * channels + channel, g_begins[i], mask=inside)


@triton.jit
def _place(heads, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr, CHUNK: tl.constexpr):
    """A program's channels (heads, dim), which of them there are, and the first token of its chunk."""
    blocks = tl.cdiv(heads, BLOCK_HEADS)
    head = tl.program_id(0) % blocks * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    dim = tl.arange(0, PADDED_DIM)[None, :]
    return head * HEAD_DIM + dim, (head < heads) & (dim < HEAD_DIM), tl.program_id(0) // blocks * CHUNK


@triton.jit
def _taps(weight, channel, inside, KERNEL: tl.constexpr):
    """What multiplies the token now, the one before it, and so on."""
    taps = ()
    for i in tl.static_range(KERNEL):
        tap = tl.load(weight + channel * KERNEL + (KERNEL - 1 - i), mask=inside, other=0.0).to(tl.float32)
        taps = taps + (tap,)
    return taps


@triton.jit
def _rows(rows, channel, inside, channels, REACH: tl.constexpr):
    """REACH tokens, the last one first."""
    tokens = ()
    for i in tl.static_range(REACH):
        token = tl.load(rows + (REACH - 1 - i) * channels + channel, mask=inside, other=0.0)
        tokens = tokens + (token.to(tl.float32),)
    return tokens


@triton.jit
def _mixed(now, before, taps, REACH: tl.constexpr):
    mixed = now * taps[0]
    for i in tl.static_range(REACH):
        mixed += before[i] * taps[i + 1]
    return mixed


@triton.jit
def _multiplied_and_added(sums, factor, values, COUNT: tl.constexpr):
    new = ()
    for i in tl.static_range(COUNT):
        new = new + (sums[i] + factor * values[i],)
    return new


@triton.jit
def _added_since(g_reached, g_mixed, taps, since, KERNEL: tl.constexpr):
    """To the tokens that the document has."""
    new = ()
    for i in tl.static_range(KERNEL):
        new = new + (g_reached[i] + tl.where(i <= since, taps[i] * g_mixed, 0.0),)
    return new


@triton.jit
def _added_to_begin(g_begins, g_mixed, taps, since, REACH: tl.constexpr):
    """To what lies before the document, as far as it is reached `since` tokens after its first."""
    new = ()
    for i in tl.static_range(REACH):
        g = g_begins[i]
        for j in tl.static_range(REACH - i):
            g += tl.where(since == j, taps[1 + i + j] * g_mixed, 0.0)
        new = new + (g,)
    return new


@triton.jit
def _inverse_length(out):
    """1 / length of every head (heads, dim), its length raised to 1e-12 if it is less."""
    return tl.rsqrt(tl.maximum(tl.sum(out * out, 1), 1e-24))
