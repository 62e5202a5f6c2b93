# mypy: disable-error-code="no-untyped-def"
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

CHUNK = 64  # tokens a program writes; it reads kernel - 1 more forward and twice as many backward
CHANNELS = 1024  # that a program has at most, unless a head is larger: 8 for each of 128 threads, 16 bytes in bfloat16


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
        g_begin = None if begin is None else torch.empty_like(g_weight[:, 1:])
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
            g_weight.sum(0).T.to(weight.dtype),
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
    constants, num_warps = _tile(channels // head_dim, head_dim)
    blocks = triton.cdiv(channels // head_dim, constants["BLOCK_HEADS"])
    return (blocks * triton.cdiv(length, CHUNK), batch), constants | {"KERNEL": kernel, "UNIT": unit}, num_warps


def _tile(heads: int, head_dim: int) -> tuple[dict[str, Any], int]:
    """The heads of a program, and its warps."""
    padded = triton.next_power_of_2(head_dim)
    block_heads = min(triton.next_power_of_2(heads), max(1, CHANNELS // padded))
    constants = {"HEAD_DIM": head_dim, "PADDED_DIM": padded, "BLOCK_HEADS": block_heads, "CHUNK": CHUNK}
    return constants, max(1, block_heads * padded // 256)


def configurations() -> Iterator[Configuration]:
    """For 1024 channels; of the forms without documents or without unit length, those in bfloat16."""
    integers = {"length": "i32", "heads": "i32", "past_stride": "i32"}
    for dtype, head_dim, unit, documents in product(("bf16", "fp32"), (64, 96, 128), (True, False), (True, False)):
        if dtype == "fp32" and not (unit and documents):
            continue
        constants, num_warps = _tile(1024 // head_dim, head_dim)
        constants |= {"KERNEL": 4, "UNIT": unit}
        pointer, sums, own = f"*{dtype}", "*fp32", {"begin": f"*{dtype}", "starts": "*u8"}
        inputs = {"x": pointer, "past": pointer, "weight": pointer, **integers}
        gradients = {"g_y": pointer, "g_x": pointer, "g_past": sums, "g_weight": sums}
        name = f"{dtype} head_dim={head_dim}{' unit' if unit else ''}{' documents' if documents else ''}"
        for kernel, more in ((_forward_kernel, {"y": pointer}), (_backward_kernel, gradients)):
            signature, absent = {**inputs, **more, **own}, {}
            if kernel is _backward_kernel:
                signature["g_begin"] = sums
            if not documents:
                absent = {argument: None for argument in ("begin", "starts", "g_begin") if argument in signature}
            kind = "forward" if kernel is _forward_kernel else "backward"
            yield Configuration(
                f"short_conv {kind} {name}",
                kernel,
                {argument: kind for argument, kind in signature.items() if argument not in absent},
                {**constants, **absent},
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
    before = _before(past + tl.program_id(1).to(tl.int64) * past_stride, channel, inside, channels, first, REACH)
    # The tokens before the chunk are walked over as well: they fill `before`, and a document may start among them.
    token = tl.maximum(first - REACH, 0)
    following = tl.load(x + (row + token) * channels + channel, mask=inside)
    for t in range(token, last):
        now = following.to(tl.float32)
        following = tl.load(x + (row + t + 1) * channels + channel, mask=inside & (t + 1 < last))
        if starts is not None:
            before = _begun(before, begin, tl.load(starts + row + t) != 0, channel, inside, channels, REACH)
        mixed = _mixed(now, before, taps, REACH)
        out = mixed * tl.sigmoid(mixed)
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
    before = _before(past + batch * past_stride, channel, inside, channels, first, REACH)
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
            start = tl.load(starts + row + t, mask=t < length, other=0) != 0
            before = _begun(before, begin, start, channel, inside, channels, REACH)
            since = tl.where(start, 0, tl.minimum(since + 1, REACH))

        mixed = _mixed(now, before, taps, REACH)
        sigmoid = tl.sigmoid(mixed)
        if UNIT:
            out = mixed * sigmoid
            inverse = _inverse_length(out)
            # Shorter than this, the length counts as a constant.
            along = tl.where(inverse < 1e12, tl.sum(g_out * out, 1) * inverse * inverse, 0.0)
            g_out = (g_out - out * along[:, None]) * inverse[:, None]
        g_mixed = g_out * sigmoid * (1.0 + mixed * (1.0 - sigmoid))

        own = tl.where((t >= first) & (t < last), g_mixed, 0.0)
        reached = (now,) + before
        g_reached = (zero,) + g_before
        new_taps = ()
        new_reached = ()
        for i in tl.static_range(KERNEL):
            new_taps = new_taps + (g_taps[i] + own * reached[i],)
            g = taps[i] * g_mixed
            if starts is not None:
                g = tl.where(i <= since, g, 0.0)
            new_reached = new_reached + (g_reached[i] + g,)
        g_taps = new_taps
        if starts is not None:
            if since < REACH:
                new_begins = ()
                for j in tl.static_range(REACH):
                    g = g_begins[j]
                    for i in tl.static_range(REACH - j, KERNEL):
                        g += tl.where(since == i - (REACH - j), taps[i] * own, 0.0)
                    new_begins = new_begins + (g,)
                g_begins = new_begins

        done = t - REACH
        whole = new_reached[REACH]
        at = g_x + (row + done) * channels + channel
        tl.store(at, whole.to(g_x.dtype.element_ty), mask=inside & (done >= first))
        if done < 0:
            tl.store(g_past + (batch * REACH + t) * channels + channel, whole, mask=inside)
        g_before = new_reached[:REACH]
        before = reached[:REACH]

    share = batch * tl.cdiv(length, CHUNK) + first // CHUNK
    for i in tl.static_range(KERNEL):
        tl.store(g_weight + (share * KERNEL + REACH - i) * channels + channel, g_taps[i], mask=inside)
    if starts is not None:
        for j in tl.static_range(REACH):
            tl.store(g_begin + (share * REACH + j) * channels + channel, g_begins[j], mask=inside)


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
def _before(past, channel, inside, channels, first, REACH: tl.constexpr):
    """The tokens before the chunk, the last one first, if it is the sequence's first chunk."""
    before = ()
    for i in tl.static_range(REACH):
        token = tl.load(past + (REACH - 1 - i) * channels + channel, mask=inside & (first == 0), other=0.0)
        before = before + (token.to(tl.float32),)
    return before


@triton.jit
def _begun(before, begin, start, channel, inside, channels, REACH: tl.constexpr):
    """`before`, or what lies before a document if it begins now."""
    begun = ()
    for i in tl.static_range(REACH):
        token = tl.load(begin + (REACH - 1 - i) * channels + channel, mask=inside & start, other=0.0)
        begun = begun + (tl.where(start, token.to(tl.float32), before[i]),)
    return begun


@triton.jit
def _mixed(now, before, taps, REACH: tl.constexpr):
    mixed = now * taps[0]
    for i in tl.static_range(REACH):
        mixed += before[i] * taps[i + 1]
    return mixed


@triton.jit
def _inverse_length(out):
    """1 / length of every head (heads, dim), of at least 1e-12."""
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(out * out, 1)), 1e-12)
