"""The write pass backward with the state's adjoint in registers: `write_backward_kernel` for Hopper, depth 2.

As in `write_resident_kernel` one program of two warpgroups takes one row, and products have their operands in shared
memory. What the gradient of gradients needs of a chunk's hidden units goes by in parts of 64.

Registers are scarce: addresses are made anew in every part of the loop (`_anew`), and barriers that no data needs keep
the compiler from loading for all parts at once.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM102  (Triton works out both sides of `and`)

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma
from triton.language import debug_barrier

from titans_kernels.activation import activate
from titans_kernels.ahead_of_time import Configuration
from titans_kernels.descent import descend_back
from titans_kernels.write import BORDER, RESET
from titans_kernels.write_resident import _anew, _anew_scalar, _at, _copy_tokens, _unknown_zero

WARPS = 8


def supports(dtype: torch.dtype, head: int, hidden: int, depth: int, chunk: int) -> bool:
    """Whether `write_backward_resident_kernel` has a form for this; `chunk` is what tiles are padded to."""
    return dtype == torch.bfloat16 and chunk == 64 and head == 64 and hidden in (64, 128) and depth == 2


@gluon.jit
def _tile_at(zero, j, ROWS: gl.constexpr, COLUMNS: gl.constexpr, WIDTH: gl.constexpr, layout: gl.constexpr):
    """Where columns [j, j + COLUMNS) of a (ROWS, WIDTH) tile are."""
    r = _anew(gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout)) + zero)
    c = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout)) + j
    return r[:, None] * WIDTH + c[None, :]


@gluon.jit
def _copy_tile(shared, x, zero, ROWS: gl.constexpr, WIDTH: gl.constexpr, layout: gl.constexpr):
    """Starts to copy the (ROWS, WIDTH) tile at x."""
    async_copy.async_copy_global_to_shared(shared, x + _at(zero, ROWS, WIDTH, layout))


@gluon.jit
def _inner_product(x, y):
    return gl.sum(gl.sum(x * y, 1), 0)


@gluon.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@gluon.jit
def _add_triples(a, b, c, d, e, f):
    return a + d, b + e, c + f


@gluon.jit
def _inner_products(g, h, w, s):
    """The sums of g w, g s and h s."""
    a, b, c = gl.reduce((g * w, g * s, h * s), 1, _add_triples)
    return gl.reduce((a, b, c), 0, _add_triples)


@gluon.jit
def _largest(x):
    return gl.max(gl.max(gl.abs(x), 1), 0)


@gluon.jit
def _loaded(x, zero, ROWS: gl.constexpr, WIDTH: gl.constexpr, layout: gl.constexpr):
    """The tile at x, no sooner than here."""
    debug_barrier()
    return gl.load(x + _at(zero, ROWS, WIDTH, layout))


@gluon.jit
def _moved(x, sum_, zero, ROWS: gl.constexpr, WIDTH: gl.constexpr, layout: gl.constexpr):
    """Adds x to a sum in memory, and leaves zeros where it was."""
    debug_barrier()  # one at a time: the compiler would load all sums first
    at = sum_ + _at(zero, ROWS, WIDTH, layout)
    gl.store(at, gl.load(at) + x)
    return gl.zeros([ROWS, WIDTH], gl.float32, layout)


@gluon.jit
def _square(x, top):
    """The sum of (x / top)^2."""
    x *= 1.0 / top
    return _inner_product(x, x)


@gluon.jit
def _shortened(x, norm, most):
    """x if its norm is `most` or less; else x / norm * most, and zero where that is not a number."""
    y = x * (1.0 / norm) * most
    return gl.where(norm <= most, x, gl.where(y == y, y, 0.0))


@gluon.jit
def write_backward_resident_kernel(
    k, v, limit, outputs, descents, begins, lengths, flags, add, keep, gain, bias, largest,
    chunk_w1, chunk_s1, chunk_w2, chunk_s2, from_w1, from_s1, from_w2, from_s2,
    g_w1, g_s1, g_w2, g_s2, g_begin_w1, g_begin_s1, g_begin_w2, g_begin_s2,
    g_reads, g_k, g_v, g_limit, g_descents, g_outputs, inner, pulled, g_inputs, g_hidden, g_add, g_keep, g_gain, g_bias,
    length_t, heads, chunks, first, count,
    HEAD: gl.constexpr, HIDDEN: gl.constexpr, DIM: gl.constexpr, BLOCK: gl.constexpr, CHUNK: gl.constexpr,
    DEPTH: gl.constexpr, MOMENTUM: gl.constexpr, RESIDUAL: gl.constexpr, LOSS: gl.constexpr,
    ACTIVATION: gl.constexpr, STARTS: gl.constexpr, LIMITED: gl.constexpr, PRECISION: gl.constexpr,
):  # fmt: skip
    """Arguments as of `write_backward_kernel`; of the reads' parts only g_reads is written over, and g_outputs, BLOCK
    and PRECISION are not used.
    """
    gl.static_assert(gl.num_warps() == 8 and CHUNK == 64 and DIM == 64 and HEAD == 64 and DEPTH == 2)
    PART: gl.constexpr = 64
    ROWS: gl.constexpr = 16
    # No product is added to S's adjoint: where registers do not suffice it waits in L2, in g_s1 and g_s2.
    PARKED: gl.constexpr = MOMENTUM and (HIDDEN == 128 or not RESIDUAL)
    bf16: gl.constexpr = gl.bfloat16
    f32: gl.constexpr = gl.float32
    of_in: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, HIDDEN // 2, 16])
    part: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, PART // 2, 16])  # (CHUNK, HEAD) also
    of_out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, HEAD, 16]) if HIDDEN == 128 else part
    head_rows: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    in_rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HIDDEN, HIDDEN // 8], [8, 1], [1, 0])
    few_units: gl.constexpr = gl.BlockedLayout([1, HIDDEN // 16], [2, 16], [8, 1], [1, 0])
    few: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [8, 1], [1, 0])
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    keys = gl.allocate_shared_memory(bf16, [1, CHUNK, HEAD], swizzled)
    downs = gl.allocate_shared_memory(bf16, [1, CHUNK, HEAD], swizzled)
    g_ups = gl.allocate_shared_memory(bf16, [1, CHUNK, HEAD], swizzled)
    staged = gl.allocate_shared_memory(f32, [1, CHUNK, HEAD], gl.NVMMASharedLayout(128, 32, 2))
    units = gl.allocate_shared_memory(bf16, [1, CHUNK, HIDDEN], swizzled)
    pulls = gl.allocate_shared_memory(bf16, [1, CHUNK, HIDDEN], swizzled)
    g_pulls = gl.allocate_shared_memory(bf16, [1, CHUNK, HIDDEN], swizzled)
    slopes = gl.allocate_shared_memory(bf16, [1, CHUNK, HIDDEN], swizzled)
    bends = gl.allocate_shared_memory(bf16, [1, CHUNK, HIDDEN], swizzled)
    operands_w1 = gl.allocate_shared_memory(bf16, [1, HEAD, HIDDEN], swizzled)
    operands_w2 = gl.allocate_shared_memory(bf16, [1, HIDDEN, HEAD], swizzled)
    g_operands_w1 = gl.allocate_shared_memory(bf16, [1, HEAD, HIDDEN], swizzled)
    g_operands_w2 = gl.allocate_shared_memory(bf16, [1, HIDDEN, HEAD], swizzled)
    if MOMENTUM:
        g_operands_s1 = gl.allocate_shared_memory(bf16, [1, HEAD, HIDDEN], swizzled)
        g_operands_s2 = gl.allocate_shared_memory(bf16, [1, HIDDEN, HEAD], swizzled)

    row = gl.program_id(0).to(gl.int64)
    batch, head = row // heads, row % heads
    size: gl.constexpr = HEAD * HIDDEN
    own = batch * length_t * heads + head
    n = batch * chunks + first + count - 1
    begin = gl.load(begins + n)
    length = gl.load(lengths + n)
    zero = _unknown_zero(length)
    of_chunk = row * count + count - 1
    _copy_tokens(keys.index(zero), k + own * HEAD, begin, length, heads, zero, HEAD, CHUNK, head_rows)
    _copy_tokens(
        downs.index(zero), descents + of_chunk * (CHUNK * HEAD), begin * 0, length, 1, zero, HEAD, CHUNK, head_rows
    )
    _copy_tile(operands_w1.index(zero), chunk_w1 + of_chunk * size, zero, HEAD, HIDDEN, in_rows)
    _copy_tile(operands_w2.index(zero), chunk_w2 + of_chunk * size, zero, HIDDEN, HEAD, head_rows)
    async_copy.commit_group()
    G1 = gl.load(g_w1 + row * size + _at(zero, HEAD, HIDDEN, of_in))
    G2 = gl.load(g_w2 + row * size + _at(zero, HIDDEN, HEAD, of_out))
    if MOMENTUM:
        if PARKED:
            g_operands_s1.index(zero).store(gl.load(g_s1 + row * size + _at(zero, HEAD, HIDDEN, of_in)).to(bf16))
            g_operands_s2.index(zero).store(gl.load(g_s2 + row * size + _at(zero, HIDDEN, HEAD, of_out)).to(bf16))
        else:
            H1 = gl.load(g_s1 + row * size + _at(zero, HEAD, HIDDEN, of_in))
            H2 = gl.load(g_s2 + row * size + _at(zero, HIDDEN, HEAD, of_out))

    for back in range(count):
        zero = _unknown_zero(length)
        key, a, d1 = keys.index(zero), units.index(zero), pulls.index(zero)
        g_w1_now, g_w2_now = g_operands_w1.index(zero), g_operands_w2.index(zero)
        of_chunk = _anew_scalar(row * count + count - 1 - back)
        own = _anew_scalar(batch * length_t * heads + head)
        saved = of_chunk * size
        hidden = of_chunk * (CHUNK * HIDDEN)
        tokens = of_chunk * (CHUNK * HEAD)
        where = (own + begin.to(gl.int64) * heads) * HEAD
        g_w1_now.store(G1.to(bf16))
        g_w2_now.store(G2.to(bf16))
        if MOMENTUM:
            g_s1_now, g_s2_now = g_operands_s1.index(zero), g_operands_s2.index(zero)
            if not PARKED:
                g_s1_now.store(H1.to(bf16))
                g_s2_now.store(H2.to(bf16))
        r = _anew(gl.arange(0, CHUNK, layout=gl.SliceLayout(1, part)) + zero)
        valid = (r < length)[:, None]
        add_w = gl.load(add + of_chunk * 2 * CHUNK + r)[:, None]
        add_s = gl.load(add + of_chunk * 2 * CHUNK + CHUNK + r)[:, None]
        # The activation once for all: of the keys' units, their slopes, descents, and descents times curvature.
        for i in gl.static_range(0, CHUNK, ROWS):
            debug_barrier()
            few_r = _anew(gl.arange(0, ROWS, layout=gl.SliceLayout(1, few_units)) + (i + zero))
            unit = gl.arange(0, HIDDEN, layout=gl.SliceLayout(0, few_units))
            at = few_r[:, None] * HIDDEN + unit[None, :]
            few_valid = (few_r < length)[:, None]
            z1 = gl.load(inner + hidden + at, mask=few_valid, other=0.0).to(f32)
            active, slope, curvature = activate(z1, ACTIVATION)
            a.slice(i, ROWS, 0).store(active.to(bf16))
            slopes.index(zero).slice(i, ROWS, 0).store(slope.to(bf16))
            x = gl.load(pulled + hidden + at, mask=few_valid, other=0.0).to(f32)
            d1.slice(i, ROWS, 0).store((x * slope).to(bf16))
            bends.index(zero).slice(i, ROWS, 0).store((x * curvature).to(bf16))
        async_copy.wait_group(0)
        fence_async_shared()
        debug_barrier()

        # The first layer's part of the keys, while its descents are there.
        x = key.load(part).to(f32)
        up = warpgroup_mma(d1, g_w1_now.permute((1, 0)), gl.zeros([CHUNK, HEAD], f32, part))
        g_key = up * add_w
        g_add_w = gl.sum(x * up, 1)
        g_add_s = r * 0.0
        if MOMENTUM:
            up = warpgroup_mma(d1, g_s1_now.permute((1, 0)), gl.zeros([CHUNK, HEAD], f32, part))
            g_key += up * add_s
            g_add_s += gl.sum(x * up, 1)
        at = _at(zero, CHUNK, HEAD, part)
        g_key += gl.load(g_reads + tokens + at, mask=valid, other=0.0)
        gl.store(g_reads + tokens + at, g_key, mask=valid)

        # Up: what the update asks of the inputs and descents of each layer, and through these of the last descent.
        zero = _anew(zero)
        key, a, d1, g_pulled = keys.index(zero), units.index(zero), pulls.index(zero), g_pulls.index(zero)
        w2_now, g_w1_now, g_w2_now = operands_w2.index(zero), g_operands_w1.index(zero), g_operands_w2.index(zero)
        if MOMENTUM:
            g_s1_now, g_s2_now = g_operands_s1.index(zero), g_operands_s2.index(zero)
        for j in gl.static_range(0, HIDDEN, PART):
            debug_barrier()
            at = _tile_at(zero, j, CHUNK, PART, HIDDEN, part)
            g = warpgroup_mma(key, g_w1_now.slice(j, PART, 1), gl.zeros([CHUNK, PART], f32, part)) * add_w
            if MOMENTUM:
                g += warpgroup_mma(key, g_s1_now.slice(j, PART, 1), gl.zeros([CHUNK, PART], f32, part)) * add_s
            g += gl.load(g_hidden + hidden + at, mask=valid, other=0.0).to(f32)
            d1.slice(j, PART, 1).store(g.to(bf16))  # its gradient from here on
            g *= slopes.index(zero).slice(j, PART, 1).load(part).to(f32)
            g_pulled.slice(j, PART, 1).store(g.to(bf16))
        fence_async_shared()
        at = _at(zero, CHUNK, HEAD, part)
        g = warpgroup_mma(a, g_w2_now, gl.zeros([CHUNK, HEAD], f32, part)) * add_w
        if MOMENTUM:
            g += warpgroup_mma(a, g_s2_now, gl.zeros([CHUNK, HEAD], f32, part)) * add_s
        g += gl.load(g_descents + tokens + at, mask=valid, other=0.0)
        staged.index(zero).store(warpgroup_mma(g_pulled, w2_now, g))

        # Through the descent at the output, a few tokens at a time: it needs a dozen tiles at once.
        zero = _anew(zero)
        key, g_z2, stage = keys.index(zero), g_ups.index(zero), staged.index(zero)
        c = gl.arange(0, HEAD, layout=gl.SliceLayout(0, few)) + zero
        inside = (c >= 0)[None, :]
        gains = c * 0.0
        biases = c * 0.0
        if RESIDUAL:
            of_head = _anew_scalar(head) * HEAD
            gains = gl.load(gain + of_head + c)
            biases = gl.load(bias + of_head + c)
        of_gain = gl.zeros([ROWS, HEAD], f32, few)
        of_bias = gl.zeros([ROWS, HEAD], f32, few)
        for i in gl.static_range(0, CHUNK, ROWS):
            debug_barrier()
            few_r = _anew(gl.arange(0, ROWS, layout=gl.SliceLayout(1, few)) + (i + zero))
            few_valid = (few_r < length)[:, None]
            token = few_r[:, None] * (heads * HEAD) + c[None, :]
            far = few_r * 0.0
            if LOSS == "huber":
                far = gl.load(limit + own + (begin + few_r) * heads, mask=few_r < length, other=1.0)
            g_z, g_f, g_value, g_far, part_of_gain, part_of_bias = descend_back(
                stage.slice(i, ROWS, 0).load(few),
                gl.load(outputs + tokens + (few_r[:, None] * HEAD + c[None, :]), mask=few_valid, other=0.0),
                key.slice(i, ROWS, 0).load(few).to(f32),
                gl.load(v + where + token, mask=few_valid, other=0.0).to(f32),
                far, gains, biases, inside, HEAD, RESIDUAL, LOSS,
            )  # fmt: skip
            g_z2.slice(i, ROWS, 0).store(gl.where(few_valid, g_z, 0.0).to(bf16))
            gl.store(g_v + where + token, g_value, mask=few_valid)
            if LOSS == "huber":
                gl.store(g_limit + own + (begin + few_r) * heads, g_far, mask=few_r < length)
            if RESIDUAL:
                stage.slice(i, ROWS, 0).store(g_f)
                of_gain += gl.where(few_valid, part_of_gain, 0.0)
                of_bias += gl.where(few_valid, part_of_bias, 0.0)
        if RESIDUAL:
            sums = of_chunk * HEAD
            sum_of_gain, sum_of_bias = gl.reduce((of_gain, of_bias), 0, _add_pairs)
            gl.store(g_gain + sums + c, gl.load(g_gain + sums + c) + sum_of_gain)
            gl.store(g_bias + sums + c, gl.load(g_bias + sums + c) + sum_of_bias)
        fence_async_shared()

        # Down: through the network.
        zero = _anew(zero)
        a, d1, d2, g_z2, stage = (
            units.index(zero),
            pulls.index(zero),
            downs.index(zero),
            g_ups.index(zero),
            staged.index(zero),
        )
        w1_now, w2_now, g_w2_now = operands_w1.index(zero), operands_w2.index(zero), g_operands_w2.index(zero)
        if MOMENTUM:
            g_s2_now = g_operands_s2.index(zero)
        for j in gl.static_range(0, HIDDEN, PART):
            debug_barrier()
            at = _tile_at(zero, j, CHUNK, PART, HIDDEN, part)
            up = warpgroup_mma(d2, g_w2_now.slice(j, PART, 0).permute((1, 0)), gl.zeros([CHUNK, PART], f32, part))
            g_a = up * add_w
            active = a.slice(j, PART, 1).load(part).to(f32)
            g_add_w += gl.sum(active * up, 1)
            if MOMENTUM:
                up = warpgroup_mma(d2, g_s2_now.slice(j, PART, 0).permute((1, 0)), gl.zeros([CHUNK, PART], f32, part))
                g_a += up * add_s
                g_add_s += gl.sum(active * up, 1)
            g_a += gl.load(g_inputs + hidden + at, mask=valid, other=0.0).to(f32)
            g_a = warpgroup_mma(g_z2, w2_now.slice(j, PART, 0).permute((1, 0)), g_a)
            g_a *= slopes.index(zero).slice(j, PART, 1).load(part).to(f32)
            g = d1.slice(j, PART, 1).load(part).to(f32) * bends.index(zero).slice(j, PART, 1).load(part).to(f32)
            d1.slice(j, PART, 1).store((g_a + g).to(bf16))  # and from here on that at the first layer's z
        fence_async_shared()
        at = _at(zero, CHUNK, HEAD, part)
        g_key = gl.load(g_reads + tokens + at, mask=valid, other=0.0)
        if RESIDUAL:
            g_key += stage.load(part)
        g_key = warpgroup_mma(d1, w1_now.permute((1, 0)), g_key)
        c = gl.arange(0, HEAD, layout=gl.SliceLayout(0, part))
        token = r[:, None] * (heads * HEAD) + c[None, :]
        gl.store(g_k + where + token, g_key, mask=valid)
        gl.store(g_add + of_chunk * 2 * CHUNK + r, g_add_w)
        gl.store(g_add + of_chunk * 2 * CHUNK + CHUNK + r, g_add_s)

        # Into the adjoint of the state the chunk began with.
        zero = _anew(zero)
        key, a, d1, d2, g_pulled = (
            keys.index(zero),
            units.index(zero),
            pulls.index(zero),
            downs.index(zero),
            g_pulls.index(zero),
        )
        g_z2, w1_now, w2_now = g_ups.index(zero), operands_w1.index(zero), operands_w2.index(zero)
        keep_w = gl.load(keep + of_chunk * 4)
        keep_t = gl.load(keep + of_chunk * 4 + 1)
        keep_s = gl.load(keep + of_chunk * 4 + 2)
        here = _anew_scalar(row) * size
        at_in = _at(zero, HEAD, HIDDEN, of_in)
        at_out = _at(zero, HIDDEN, HEAD, of_out)
        if MOMENTUM:
            first_s = gl.load(g_s1 + here + at_in) if PARKED else H1
            w, t, s = _inner_products(
                G1, first_s, w1_now.load(of_in).to(f32), gl.load(chunk_s1 + saved + at_in).to(f32)
            )
            debug_barrier()
            first_s = gl.load(from_s1 + saved + at_in).to(f32) + keep_t * G1 + keep_s * first_s
            if PARKED:
                gl.store(g_s1 + here + at_in, first_s)
                g_operands_s1.index(zero).store(first_s.to(bf16))
            else:
                H1 = first_s
            debug_barrier()
            last_s = gl.load(g_s2 + here + at_out) if PARKED else H2
            w_2, t_2, s_2 = _inner_products(
                G2, last_s, w2_now.load(of_out).to(f32), gl.load(chunk_s2 + saved + at_out).to(f32)
            )
            of_keep_w, of_keep_t, of_keep_s = w + w_2, t + t_2, s + s_2
            debug_barrier()
            last_s = gl.load(from_s2 + saved + at_out).to(f32) + keep_t * G2 + keep_s * last_s
            if PARKED:
                gl.store(g_s2 + here + at_out, last_s)
                g_operands_s2.index(zero).store(last_s.to(bf16))
            else:
                H2 = last_s
        else:
            of_keep_w = _inner_product(G1, w1_now.load(of_in).to(f32)) + _inner_product(G2, w2_now.load(of_out).to(f32))
            of_keep_t = 0.0
            of_keep_s = 0.0
        gl.store(g_keep + of_chunk * 4, of_keep_w)
        gl.store(g_keep + of_chunk * 4 + 1, of_keep_t)
        gl.store(g_keep + of_chunk * 4 + 2, of_keep_s)
        debug_barrier()
        G1 = warpgroup_mma(key.permute((1, 0)), d1, gl.load(from_w1 + saved + at_in).to(f32) + keep_w * G1)
        debug_barrier()
        G2 = warpgroup_mma(g_pulled.permute((1, 0)), d2, gl.load(from_w2 + saved + at_out).to(f32) + keep_w * G2)
        G2 = warpgroup_mma(a.permute((1, 0)), g_z2, G2)

        of_batch = _anew_scalar(batch * chunks + first)
        flag = gl.load(flags + of_batch + (count - 1 - back))
        n = of_batch + max(count - 2 - back, 0)
        begin = gl.load(begins + n)
        length = gl.load(lengths + n)
        of_chunk = _anew_scalar(row * count + max(count - 2 - back, 0))
        _copy_tokens(key, k + own * HEAD, begin, length, heads, zero, HEAD, CHUNK, head_rows)
        _copy_tokens(d2, descents + of_chunk * (CHUNK * HEAD), begin * 0, length, 1, zero, HEAD, CHUNK, head_rows)
        _copy_tile(w1_now, chunk_w1 + of_chunk * size, zero, HEAD, HIDDEN, in_rows)
        _copy_tile(w2_now, chunk_w2 + of_chunk * size, zero, HIDDEN, HEAD, head_rows)
        async_copy.commit_group()
        if STARTS:
            if (flag & RESET) != 0:
                here = _anew_scalar(row) * size
                G1 = _moved(G1, g_begin_w1 + here, _anew(zero), HEAD, HIDDEN, of_in)
                G2 = _moved(G2, g_begin_w2 + here, _anew(zero), HIDDEN, HEAD, of_out)
                if MOMENTUM:
                    if PARKED:
                        first_s = _loaded(g_s1 + here, zero, HEAD, HIDDEN, of_in)
                        first_s = _moved(first_s, g_begin_s1 + here, zero, HEAD, HIDDEN, of_in)
                        gl.store(g_s1 + here + _at(zero, HEAD, HIDDEN, of_in), first_s)
                        g_operands_s1.index(zero).store(first_s.to(bf16))
                        last_s = _loaded(g_s2 + here, zero, HIDDEN, HEAD, of_out)
                        last_s = _moved(last_s, g_begin_s2 + here, zero, HIDDEN, HEAD, of_out)
                        gl.store(g_s2 + here + _at(zero, HIDDEN, HEAD, of_out), last_s)
                        g_operands_s2.index(zero).store(last_s.to(bf16))
                    else:
                        H1 = _moved(H1, g_begin_s1 + here, _anew(zero), HEAD, HIDDEN, of_in)
                        H2 = _moved(H2, g_begin_s2 + here, _anew(zero), HIDDEN, HEAD, of_out)
        if LIMITED:
            if (flag & BORDER) != 0:
                here = _anew_scalar(row) * size
                # The largest first: an exploding gradient's own squares are infinite long before it is.
                top = gl.maximum(_largest(G1), _largest(G2))
                if MOMENTUM:
                    top = gl.maximum(top, _largest(_loaded(g_s1 + here, zero, HEAD, HIDDEN, of_in) if PARKED else H1))
                    top = gl.maximum(top, _largest(_loaded(g_s2 + here, zero, HIDDEN, HEAD, of_out) if PARKED else H2))
                top = gl.maximum(top, 1.1754943508222875e-38)
                square = _square(G1, top) + _square(G2, top)
                if MOMENTUM:
                    square += _square(_loaded(g_s1 + here, zero, HEAD, HIDDEN, of_in) if PARKED else H1, top)
                    square += _square(_loaded(g_s2 + here, zero, HIDDEN, HEAD, of_out) if PARKED else H2, top)
                norm = top * gl.sqrt(square)
                most = gl.load(largest + row)
                G1 = _shortened(G1, norm, most)
                G2 = _shortened(G2, norm, most)
                if MOMENTUM:
                    if PARKED:
                        first_s = _shortened(_loaded(g_s1 + here, zero, HEAD, HIDDEN, of_in), norm, most)
                        gl.store(g_s1 + here + _at(zero, HEAD, HIDDEN, of_in), first_s)
                        g_operands_s1.index(zero).store(first_s.to(bf16))
                        last_s = _shortened(_loaded(g_s2 + here, zero, HIDDEN, HEAD, of_out), norm, most)
                        gl.store(g_s2 + here + _at(zero, HIDDEN, HEAD, of_out), last_s)
                        g_operands_s2.index(zero).store(last_s.to(bf16))
                    else:
                        H1 = _shortened(H1, norm, most)
                        H2 = _shortened(H2, norm, most)

    async_copy.wait_group(0)
    zero = _unknown_zero(length)
    gl.store(g_w1 + row * size + _at(zero, HEAD, HIDDEN, of_in), G1)
    gl.store(g_w2 + row * size + _at(zero, HIDDEN, HEAD, of_out), G2)
    if MOMENTUM:
        if not PARKED:
            gl.store(g_s1 + row * size + _at(zero, HEAD, HIDDEN, of_in), H1)
            gl.store(g_s2 + row * size + _at(zero, HIDDEN, HEAD, of_out), H2)


OPTIONS: tuple[tuple[str, dict[str, object]], ...] = (
    ("l2", {}),
    ("huber documents limited", {"LOSS": "huber", "STARTS": True, "LIMITED": True}),
    ("no momentum", {"MOMENTUM": False}),
    ("no norm dot silu", {"RESIDUAL": False, "LOSS": "dot", "ACTIVATION": "silu"}),
)


def configurations() -> Iterator[Configuration]:
    """Every size `supports` knows, with gelu, momentum and norm but where the name says otherwise."""
    for (size, hidden), (name, options) in product((("x1", 64), ("x2", 128)), OPTIONS):
        constants: dict[str, object] = {
            "HEAD": 64, "HIDDEN": hidden, "DIM": 64, "BLOCK": 32, "CHUNK": 64, "DEPTH": 2, "MOMENTUM": True,
            "RESIDUAL": True, "LOSS": "l2", "ACTIVATION": "gelu", "STARTS": False, "LIMITED": False,
            "PRECISION": "tf32x3", **options,
        }  # fmt: skip
        slots = [x + y for x in ("ws" if constants["MOMENTUM"] else "w") for y in "12"]
        halves = ["k", "v", "descents", "g_k", "g_v", "g_outputs", "inner", "pulled", "g_inputs", "g_hidden"]
        types = dict.fromkeys([*halves, *(f"{kind}_{x}" for x in slots for kind in ("chunk", "from"))], "*bf16")
        sums = ["outputs", "add", "keep", "g_reads", "g_descents", "g_add", "g_keep"]
        types |= dict.fromkeys([*sums, *(f"g_{x}" for x in slots)], "*fp32")
        types |= dict.fromkeys(["begins", "lengths", "flags"], "*i32")
        types |= dict.fromkeys(["length_t", "heads", "chunks", "first", "count"], "i32")
        if constants["STARTS"]:
            types |= {f"g_begin_{x}": "*fp32" for x in slots}
        if constants["RESIDUAL"]:
            types |= dict.fromkeys(["gain", "bias", "g_gain", "g_bias"], "*fp32")
        if constants["LOSS"] == "huber":
            types |= {"limit": "*fp32", "g_limit": "*fp32"}
        if constants["LIMITED"]:
            types["largest"] = "*fp32"
        kernel = write_backward_resident_kernel
        constants |= dict.fromkeys(x for x in kernel.arg_names if x not in types and x not in constants)
        yield Configuration(f"write_backward_resident {size} {name}", kernel, types, constants, WARPS)
