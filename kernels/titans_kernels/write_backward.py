"""The write pass backward: one program takes one row from its last chunk to its first, with the state's adjoint.

A chunk's gradients of gradients are written out: up through the update into the keys' activations and descents, through
the descent at the output, and down through the network. As in the write pass the hidden units go by twice.
"""

# ruff: noqa: SIM102  (what is known when compiling is apart from what is known when running)
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from titans_kernels.activation import activate
from titans_kernels.descent import descend_back
from titans_kernels.tiles import (
    load_in,
    load_norm,
    load_out,
    load_rows,
    load_tokens,
    load_turned,
    store_in,
    store_rows,
    store_tokens,
    store_turned,
)
from titans_kernels.write import BORDER, PART, RESET

ROWS = tl.constexpr(16)


@triton.jit
def write_backward_kernel(
    k, v, limit, outputs, descents, begins, lengths, flags, add, keep, gain, bias, largest,
    chunk_w1, chunk_s1, chunk_w2, chunk_s2, from_w1, from_s1, from_w2, from_s2,
    g_w1, g_s1, g_w2, g_s2, g_begin_w1, g_begin_s1, g_begin_w2, g_begin_s2,
    g_reads, g_k, g_v, g_limit, g_descents, g_outputs, inner, pulled, g_inputs, g_hidden, g_add, g_keep, g_gain, g_bias,
    length_t, heads, chunks, first, count,
    HEAD: tl.constexpr, HIDDEN: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    DEPTH: tl.constexpr, MOMENTUM: tl.constexpr, RESIDUAL: tl.constexpr, LOSS: tl.constexpr,
    ACTIVATION: tl.constexpr, STARTS: tl.constexpr, LIMITED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Chunks [first, first + count) of every row, last first; arguments as in `write_kernel`.

    from_*: what each chunk's reads ask of the state at its start. g_w1 ...: the adjoint, at the end on entry, at the
    start on return. g_descents, g_inputs, g_hidden and g_reads (at the keys) are the reads' part and are
    written over, g_outputs is scratch, g_k is all of it.
    g_begin_* and g_gain, g_bias (B H, count, HEAD): added to. largest (B H,): the adjoint's norm between two groups at
    most.
    """
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    size = HEAD * HIDDEN
    g_w2 += row * size
    if DEPTH == 2:
        g_w1 += row * size
    if MOMENTUM:
        g_s2 += row * size
        if DEPTH == 2:
            g_s1 += row * size
    column = tl.arange(0, DIM)
    inside = (column < HEAD)[None, :]
    r = tl.arange(0, CHUNK)
    gains, biases = load_norm(gain, bias, head, HEAD, DIM, RESIDUAL)
    for back in range(0, count):
        n = first + count - 1 - back
        begin = tl.load(begins + batch * chunks + n)
        length = tl.load(lengths + batch * chunks + n)
        of_chunk = row * count + n - first
        saved = of_chunk * size
        key = load_tokens(k, begin, length, batch, head, length_t, heads, HEAD, DIM, CHUNK)
        d2 = load_rows(descents, of_chunk, 0, length, HEAD, DIM, CHUNK)
        add_w = tl.load(add + of_chunk * 2 * CHUNK + r)[:, None]
        add_s = tl.load(add + of_chunk * 2 * CHUNK + CHUNK + r)[:, None]
        keep_w = tl.load(keep + of_chunk * 4)
        keep_t = tl.load(keep + of_chunk * 4 + 1)
        keep_s = tl.load(keep + of_chunk * 4 + 2)
        # Up: what the update asks of the inputs and descents of each layer, and through these of the last descent.
        g_d2 = load_rows(g_descents, of_chunk, 0, length, HEAD, DIM, CHUNK).to(tl.float32)
        for unit in range(0, HIDDEN, BLOCK):
            j = tl.multiple_of(unit + tl.load(keep + of_chunk * 4 + 3).to(tl.int32), BLOCK)
            a = key
            if DEPTH == 2:
                z1 = load_rows(inner, of_chunk, j, length, HIDDEN, BLOCK, CHUNK).to(tl.float32)
                a, slope, _ = activate(z1, ACTIVATION)
                a = a.to(key.dtype)
                g_d1 = load_rows(g_hidden, of_chunk, j, length, HIDDEN, BLOCK, CHUNK).to(tl.float32)
                after = load_in(g_w1, j, HIDDEN, HEAD, DIM, BLOCK).to(key.dtype)
                g_d1 += tl.dot(key, after, input_precision=PRECISION) * add_w
                if MOMENTUM:
                    after = load_in(g_s1, j, HIDDEN, HEAD, DIM, BLOCK).to(key.dtype)
                    g_d1 += tl.dot(key, after, input_precision=PRECISION) * add_s
                store_rows(g_hidden, g_d1, of_chunk, j, length, HIDDEN, BLOCK, CHUNK)
                last = load_out(chunk_w2 + saved, j, HIDDEN, HEAD, DIM, BLOCK)
                g_d2 = tl.dot((g_d1 * slope).to(key.dtype), last, g_d2, input_precision=PRECISION)
            after = load_out(g_w2, j, HIDDEN, HEAD, DIM, BLOCK).to(key.dtype)
            g_d2 += tl.dot(a, after, input_precision=PRECISION) * add_w
            if MOMENTUM:
                after = load_out(g_s2, j, HIDDEN, HEAD, DIM, BLOCK).to(key.dtype)
                g_d2 += tl.dot(a, after, input_precision=PRECISION) * add_s
        store_rows(g_descents, g_d2, of_chunk, 0, length, HEAD, DIM, CHUNK)
        tl.debug_barrier()
        # Through the descent at the output, a few tokens at a time: it needs a dozen tiles at once.
        of_gain = tl.zeros((DIM,), tl.float32)
        of_bias = tl.zeros((DIM,), tl.float32)
        for part in range(0, CHUNK, ROWS):
            i = part + tl.arange(0, ROWS)
            valid = (i < length)[:, None] & inside
            token = i[:, None] * (heads * HEAD) + column[None, :] + ((batch * length_t + begin) * heads + head) * HEAD
            own_row = i[:, None] * HEAD + column[None, :] + of_chunk * (CHUNK * HEAD)
            some = tl.load(k + token, mask=valid, other=0.0).to(tl.float32)
            value = tl.load(v + token, mask=valid, other=0.0).to(tl.float32)
            z2 = tl.load(outputs + own_row, mask=valid, other=0.0)
            g = tl.load(g_descents + own_row, mask=valid, other=0.0)
            far = i * 0.0
            at = (batch * length_t + begin + i) * heads + head
            if LOSS == "huber":
                far = tl.load(limit + at, mask=i < length, other=1.0)
            g_z, g_f, g_value, g_far, part_of_gain, part_of_bias = descend_back(
                g, z2, some, value, far, gains, biases, inside, HEAD, RESIDUAL, LOSS
            )
            tl.store(g_outputs + own_row, g_z.to(g_outputs.dtype.element_ty), mask=valid)
            tl.store(g_v + token, g_value.to(g_v.dtype.element_ty), mask=valid)
            if LOSS == "huber":
                tl.store(g_limit + at, g_far, mask=i < length)
            if RESIDUAL:
                direct = tl.load(g_reads + own_row, mask=valid, other=0.0)
                tl.store(g_reads + own_row, direct + g_f, mask=valid)
                of_gain += tl.sum(tl.where(valid, part_of_gain, 0.0), 0)
                of_bias += tl.sum(tl.where(valid, part_of_bias, 0.0), 0)
        if RESIDUAL:
            sums = of_chunk * HEAD + column
            older = tl.load(g_gain + sums, mask=column < HEAD, other=0.0)
            tl.store(g_gain + sums, older + of_gain, mask=column < HEAD)
            older = tl.load(g_bias + sums, mask=column < HEAD, other=0.0)
            tl.store(g_bias + sums, older + of_bias, mask=column < HEAD)
        tl.debug_barrier()
        # Down: through the network, and into the adjoint of the state the chunk began with.
        g_z2 = load_rows(g_outputs, of_chunk, 0, length, HEAD, DIM, CHUNK)
        g_key = load_rows(g_reads, of_chunk, 0, length, HEAD, DIM, CHUNK)
        g_add_w = tl.zeros((CHUNK,), tl.float32)
        g_add_s = tl.zeros((CHUNK,), tl.float32)
        of_keep_w = 0.0
        of_keep_t = 0.0
        of_keep_s = 0.0
        top = 0.0
        for unit in range(0, HIDDEN, BLOCK):
            j = tl.multiple_of(unit + tl.load(keep + of_chunk * 4 + 3).to(tl.int32), BLOCK)
            after = load_turned(g_w2, j, HIDDEN, HEAD, DIM, BLOCK).to(key.dtype)
            up = tl.dot(d2, after, input_precision=PRECISION)
            g_a = up * add_w
            a = key
            if DEPTH == 2:
                z1 = load_rows(inner, of_chunk, j, length, HIDDEN, BLOCK, CHUNK).to(tl.float32)
                a, slope, curvature = activate(z1, ACTIVATION)
            g_add_w += tl.sum(a.to(tl.float32) * up, 1)
            if MOMENTUM:
                after = load_turned(g_s2, j, HIDDEN, HEAD, DIM, BLOCK).to(key.dtype)
                up = tl.dot(d2, after, input_precision=PRECISION)
                g_a += up * add_s
                g_add_s += tl.sum(a.to(tl.float32) * up, 1)
            last = load_turned(chunk_w2 + saved, j, HIDDEN, HEAD, DIM, BLOCK)
            g_a = tl.dot(g_z2, last, g_a, input_precision=PRECISION)
            if DEPTH == 2:
                g_a += load_rows(g_inputs, of_chunk, j, length, HIDDEN, BLOCK, CHUNK)
                d1 = load_rows(pulled, of_chunk, j, length, HIDDEN, BLOCK, CHUNK).to(tl.float32)
                g_d1 = load_rows(g_hidden, of_chunk, j, length, HIDDEN, BLOCK, CHUNK).to(tl.float32)
                g_z1 = g_a * slope + g_d1 * d1 * curvature
                store_rows(g_inputs, g_z1, of_chunk, j, length, HIDDEN, BLOCK, CHUNK)
            else:
                g_key += g_a
        tl.debug_barrier()  # what is read above is written below
        for unit in range(0, HIDDEN, BLOCK):
            j = tl.multiple_of(unit + tl.load(keep + of_chunk * 4 + 3).to(tl.int32), BLOCK)
            after = load_turned(g_w2, j, HIDDEN, HEAD, DIM, BLOCK)
            last = load_turned(chunk_w2 + saved, j, HIDDEN, HEAD, DIM, BLOCK)
            of_keep_w += tl.sum(tl.sum(after * last.to(tl.float32), 1), 0)
            if MOMENTUM:
                past = load_turned(chunk_s2 + saved, j, HIDDEN, HEAD, DIM, BLOCK).to(tl.float32)
                of_keep_t += tl.sum(tl.sum(after * past, 1), 0)
                after_s = load_turned(g_s2, j, HIDDEN, HEAD, DIM, BLOCK)
                of_keep_s += tl.sum(tl.sum(after_s * past, 1), 0)
                before = load_turned(from_s2 + saved, j, HIDDEN, HEAD, DIM, BLOCK).to(tl.float32)
                before += keep_t * after + keep_s * after_s
                store_turned(g_s2, before, j, HIDDEN, HEAD, DIM, BLOCK)
                if LIMITED:
                    top = tl.maximum(top, tl.max(tl.max(tl.abs(before), 1), 0))
            before = load_turned(from_w2 + saved, j, HIDDEN, HEAD, DIM, BLOCK).to(tl.float32) + keep_w * after
            a = key
            if DEPTH == 2:
                z1 = load_rows(inner, of_chunk, j, length, HIDDEN, BLOCK, CHUNK).to(tl.float32)
                a, slope, _ = activate(z1, ACTIVATION)
                a = a.to(key.dtype)
                g_d1 = load_rows(g_hidden, of_chunk, j, length, HIDDEN, BLOCK, CHUNK).to(tl.float32)
                before = tl.dot(tl.trans(d2), (g_d1 * slope).to(key.dtype), before, input_precision=PRECISION)
            before = tl.dot(tl.trans(g_z2), a, before, input_precision=PRECISION)
            store_turned(g_w2, before, j, HIDDEN, HEAD, DIM, BLOCK)
            if LIMITED:
                top = tl.maximum(top, tl.max(tl.max(tl.abs(before), 1), 0))
        if DEPTH == 2:
            tl.debug_barrier()
            for unit in range(0, HIDDEN, BLOCK):
                j = tl.multiple_of(unit + tl.load(keep + of_chunk * 4 + 3).to(tl.int32), BLOCK)
                own = load_in(chunk_w1 + saved, j, HIDDEN, HEAD, DIM, BLOCK)
                g_z1 = load_rows(g_inputs, of_chunk, j, length, HIDDEN, BLOCK, CHUNK)
                g_key = tl.dot(g_z1, tl.trans(own), g_key, input_precision=PRECISION)
                z1 = load_rows(inner, of_chunk, j, length, HIDDEN, BLOCK, CHUNK).to(tl.float32)
                _, slope, _ = activate(z1, ACTIVATION)
                d1 = load_rows(pulled, of_chunk, j, length, HIDDEN, BLOCK, CHUNK).to(tl.float32)
                d1 = (d1 * slope).to(key.dtype)
                after = load_in(g_w1, j, HIDDEN, HEAD, DIM, BLOCK)
                of_keep_w += tl.sum(tl.sum(after * own.to(tl.float32), 1), 0)
                up = tl.dot(d1, tl.trans(after.to(key.dtype)), input_precision=PRECISION)
                g_key += up * add_w
                g_add_w += tl.sum(key.to(tl.float32) * up, 1)
                before = load_in(from_w1 + saved, j, HIDDEN, HEAD, DIM, BLOCK).to(tl.float32) + keep_w * after
                before = tl.dot(tl.trans(key), g_z1, before, input_precision=PRECISION)
                store_in(g_w1, before, j, HIDDEN, HEAD, DIM, BLOCK)
                if LIMITED:
                    top = tl.maximum(top, tl.max(tl.max(tl.abs(before), 1), 0))
                if MOMENTUM:
                    past = load_in(chunk_s1 + saved, j, HIDDEN, HEAD, DIM, BLOCK).to(tl.float32)
                    of_keep_t += tl.sum(tl.sum(after * past, 1), 0)
                    after_s = load_in(g_s1, j, HIDDEN, HEAD, DIM, BLOCK)
                    of_keep_s += tl.sum(tl.sum(after_s * past, 1), 0)
                    before = load_in(from_s1 + saved, j, HIDDEN, HEAD, DIM, BLOCK).to(tl.float32)
                    before += keep_t * after + keep_s * after_s
                    store_in(g_s1, before, j, HIDDEN, HEAD, DIM, BLOCK)
                    if LIMITED:
                        top = tl.maximum(top, tl.max(tl.max(tl.abs(before), 1), 0))
                    up = tl.dot(d1, tl.trans(after_s.to(key.dtype)), input_precision=PRECISION)
                    g_key += up * add_s
                    g_add_s += tl.sum(key.to(tl.float32) * up, 1)
        store_tokens(g_k, g_key, begin, length, batch, head, length_t, heads, HEAD, DIM, CHUNK)
        tl.store(g_add + of_chunk * 2 * CHUNK + r, g_add_w)
        tl.store(g_add + of_chunk * 2 * CHUNK + CHUNK + r, g_add_s)
        tl.store(g_keep + of_chunk * 4, of_keep_w)
        tl.store(g_keep + of_chunk * 4 + 1, of_keep_t)
        tl.store(g_keep + of_chunk * 4 + 2, of_keep_s)
        tl.debug_barrier()
        flag = tl.load(flags + batch * chunks + n)
        if STARTS:
            if (flag & RESET) != 0:
                move(g_w2, g_begin_w2 + row * size, size)
                if DEPTH == 2:
                    move(g_w1, g_begin_w1 + row * size, size)
                if MOMENTUM:
                    move(g_s2, g_begin_s2 + row * size, size)
                    if DEPTH == 2:
                        move(g_s1, g_begin_s1 + row * size, size)
                top = 0.0
                tl.debug_barrier()
        if LIMITED:
            if (flag & BORDER) != 0:
                square = squares(g_w2, top, size)
                if DEPTH == 2:
                    square += squares(g_w1, top, size)
                if MOMENTUM:
                    square += squares(g_s2, top, size)
                    if DEPTH == 2:
                        square += squares(g_s1, top, size)
                norm = tl.maximum(top, 1.1754943508222875e-38) * tl.sqrt(square)
                most = tl.load(largest + row)
                if not norm <= most:
                    shorten(g_w2, norm, most, size)
                    if DEPTH == 2:
                        shorten(g_w1, norm, most, size)
                    if MOMENTUM:
                        shorten(g_s2, norm, most, size)
                        if DEPTH == 2:
                            shorten(g_s1, norm, most, size)
                tl.debug_barrier()


@triton.jit
def move(source, sum_, size: tl.constexpr):
    """Adds `size` numbers to a sum, and leaves zeros where they were."""
    for j in range(0, size, PART):
        i = j + tl.arange(0, PART)
        x = tl.load(source + i, mask=i < size, other=0.0)
        tl.store(sum_ + i, tl.load(sum_ + i, mask=i < size, other=0.0) + x, mask=i < size)
        tl.store(source + i, x * 0.0, mask=i < size)


@triton.jit
def squares(x, top, size: tl.constexpr):
    """The sum of (x / top)^2: an exploding gradient's own squares are infinite long before it is."""
    total = tl.zeros((PART,), tl.float32)
    for j in range(0, size, PART):
        i = j + tl.arange(0, PART)
        part = tl.load(x + i, mask=i < size, other=0.0) / tl.maximum(top, 1.1754943508222875e-38)
        total += part * part
    return tl.sum(total, 0)


@triton.jit
def shorten(x, norm, most, size: tl.constexpr):
    """x / norm * most, and zero where that is not a number."""
    for j in range(0, size, PART):
        i = j + tl.arange(0, PART)
        part = tl.load(x + i, mask=i < size, other=0.0) / norm * most
        tl.store(x + i, tl.where(part == part, part, 0.0), mask=i < size)
