"""The write pass backward: one program takes one row from its last chunk to its first, with the state's adjoint.

A chunk's gradients of gradients are written out: up through the update into the keys' activations and descents, through
the descent at the output, and down through the network. As in the write pass the hidden units go by twice.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from titans_kernels.activation import activate
from titans_kernels.descent import descend_back
from titans_kernels.tiles import (
    load_in,
    load_out,
    load_rows,
    load_tokens,
    store_in,
    store_out,
    store_rows,
    store_tokens,
)
from titans_kernels.write import BORDER, RESET


@triton.jit
def write_backward_kernel(
    k, v, limit, descents, begins, lengths, flags, add, keep, gain, bias, largest,
    chunk_w1, chunk_s1, chunk_w2, chunk_s2, from_w1, from_s1, from_w2, from_s2,
    g_w1, g_s1, g_w2, g_s2, g_begin_w1, g_begin_s1, g_begin_w2, g_begin_s2,
    g_reads, g_k, g_v, g_limit, g_descents, g_inputs, g_hidden, g_add, g_keep, g_gain, g_bias,
    length_t, heads, chunks, first, count,
    HEAD: tl.constexpr, HIDDEN: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    DEPTH: tl.constexpr, MOMENTUM: tl.constexpr, RESIDUAL: tl.constexpr, LOSS: tl.constexpr,
    ACTIVATION: tl.constexpr, STARTS: tl.constexpr, LIMITED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Chunks [first, first + count) of every row, last first; arguments as in `write_kernel`.

    from_*: what each chunk's reads ask of the state at its start. g_w1 ...: the adjoint, at the end on entry, at the
    start on return. g_descents, g_inputs, g_hidden and g_reads (at the keys) are the reads' part, g_k is all of it.
    g_begin_*: added to. g_gain, g_bias (B H, count, HEAD): added to. largest (B H,): what the adjoint's norm may be between two groups.
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
    gains = column * 0.0
    biases = column * 0.0
    if RESIDUAL:
        gains = tl.load(gain + head * HEAD + column, mask=column < HEAD, other=0.0)
        biases = tl.load(bias + head * HEAD + column, mask=column < HEAD, other=0.0)
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
        keyed_w = (key.to(tl.float32) * add_w).to(key.dtype)
        keyed_s = (key.to(tl.float32) * add_s).to(key.dtype)
        # Up: what the update asks of the inputs and descents of each layer, and through these of the last descent.
        g_d2 = load_rows(g_descents, of_chunk, 0, length, HEAD, DIM, CHUNK).to(tl.float32)
        z2 = tl.zeros((CHUNK, DIM), tl.float32)
        up_w = tl.zeros((CHUNK, DIM), tl.float32)
        up_s = tl.zeros((CHUNK, DIM), tl.float32)
        for j in range(0, HIDDEN, BLOCK):
            last = load_out(chunk_w2 + saved, j, HIDDEN, HEAD, DIM, BLOCK)
            after_w = load_out(g_w2, j, HIDDEN, HEAD, DIM, BLOCK).to(key.dtype)
            if DEPTH == 2:
                own = load_in(chunk_w1 + saved, j, HIDDEN, HEAD, DIM, BLOCK)
                a, slope, _ = activate(tl.dot(key, own, input_precision=PRECISION), ACTIVATION)
                d1 = (tl.dot(d2, tl.trans(last), input_precision=PRECISION) * slope).to(key.dtype)
                after_w1 = load_in(g_w1, j, HIDDEN, HEAD, DIM, BLOCK).to(key.dtype)
                g_d1 = load_rows(g_hidden, of_chunk, j, length, HIDDEN, BLOCK, CHUNK)
                g_d1 = tl.dot(keyed_w, after_w1, g_d1.to(tl.float32), input_precision=PRECISION)
                up_w = tl.dot(d1, tl.trans(after_w1), up_w, input_precision=PRECISION)
                if MOMENTUM:
                    after_s1 = load_in(g_s1, j, HIDDEN, HEAD, DIM, BLOCK).to(key.dtype)
                    g_d1 = tl.dot(keyed_s, after_s1, g_d1, input_precision=PRECISION)
                    up_s = tl.dot(d1, tl.trans(after_s1), up_s, input_precision=PRECISION)
                store_rows(g_hidden, g_d1, of_chunk, j, length, HIDDEN, BLOCK, CHUNK)
                g_d2 = tl.dot((g_d1 * slope).to(key.dtype), last, g_d2, input_precision=PRECISION)
                a = a.to(key.dtype)
                z2 = tl.dot(a, last, z2, input_precision=PRECISION)
            else:
                a = key
                z2 = tl.dot(key, last, z2, input_precision=PRECISION)
            g_d2 = tl.dot((a.to(tl.float32) * add_w).to(key.dtype), after_w, g_d2, input_precision=PRECISION)
            if MOMENTUM:
                after_s = load_out(g_s2, j, HIDDEN, HEAD, DIM, BLOCK).to(key.dtype)
                g_d2 = tl.dot((a.to(tl.float32) * add_s).to(key.dtype), after_s, g_d2, input_precision=PRECISION)
        # Through the descent at the output.
        value = load_tokens(v, begin, length, batch, head, length_t, heads, HEAD, DIM, CHUNK)
        far = r * 0.0
        at = (batch * length_t + begin + r) * heads + head
        if LOSS == "huber":
            far = tl.load(limit + at, mask=r < length, other=1.0)
        g_z2, g_key, g_value, of_limit, of_gain, of_bias = descend_back(
            g_d2, z2, key.to(tl.float32), value.to(tl.float32), far, gains, biases, inside, HEAD, RESIDUAL, LOSS
        )
        store_tokens(g_v, g_value, begin, length, batch, head, length_t, heads, HEAD, DIM, CHUNK)
        if LOSS == "huber":
            tl.store(g_limit + at, of_limit, mask=r < length)
        if RESIDUAL:
            valid = (r < length)[:, None]
            sums = of_chunk * HEAD + column
            older = tl.load(g_gain + sums, mask=column < HEAD, other=0.0)
            tl.store(g_gain + sums, older + tl.sum(tl.where(valid, of_gain, 0.0), 0), mask=column < HEAD)
            older = tl.load(g_bias + sums, mask=column < HEAD, other=0.0)
            tl.store(g_bias + sums, older + tl.sum(tl.where(valid, of_bias, 0.0), 0), mask=column < HEAD)
        g_z2 = tl.where((r < length)[:, None], g_z2, 0.0).to(key.dtype)
        # Down: through the network, and into the adjoint of the state the chunk began with.
        g_key += load_rows(g_reads, of_chunk, 0, length, HEAD, DIM, CHUNK)
        g_add_w = tl.sum(key.to(tl.float32) * up_w, 1)
        g_add_s = tl.sum(key.to(tl.float32) * up_s, 1)
        if DEPTH == 2:
            g_key += up_w * add_w + up_s * add_s
        else:
            g_add_w = g_add_w * 0.0
            g_add_s = g_add_s * 0.0
        of_keep_w = 0.0
        of_keep_t = 0.0
        of_keep_s = 0.0
        top = 0.0
        tl.debug_barrier()
        for j in range(0, HIDDEN, BLOCK):
            last = load_out(chunk_w2 + saved, j, HIDDEN, HEAD, DIM, BLOCK)
            after_w = load_out(g_w2, j, HIDDEN, HEAD, DIM, BLOCK)
            up = tl.dot(d2, tl.trans(after_w.to(key.dtype)), input_precision=PRECISION)
            g_a = up * add_w
            if MOMENTUM:
                after_s = load_out(g_s2, j, HIDDEN, HEAD, DIM, BLOCK)
                up_of_s = tl.dot(d2, tl.trans(after_s.to(key.dtype)), input_precision=PRECISION)
                g_a += up_of_s * add_s
            g_a = tl.dot(g_z2, tl.trans(last), g_a, input_precision=PRECISION)
            before = load_out(from_w2 + saved, j, HIDDEN, HEAD, DIM, BLOCK).to(tl.float32) + keep_w * after_w
            if DEPTH == 2:
                own = load_in(chunk_w1 + saved, j, HIDDEN, HEAD, DIM, BLOCK)
                a, slope, curvature = activate(tl.dot(key, own, input_precision=PRECISION), ACTIVATION)
                pulled = tl.dot(d2, tl.trans(last), input_precision=PRECISION)
                g_d1 = load_rows(g_hidden, of_chunk, j, length, HIDDEN, BLOCK, CHUNK)
                g_d1 = g_d1.to(tl.float32)
                g_a += load_rows(g_inputs, of_chunk, j, length, HIDDEN, BLOCK, CHUNK)
                g_z1 = (g_a * slope + g_d1 * pulled * curvature).to(key.dtype)
                g_key = tl.dot(g_z1, tl.trans(own), g_key, input_precision=PRECISION)
                before = tl.dot(tl.trans((g_d1 * slope).to(key.dtype)), d2, before, input_precision=PRECISION)
                after_w1 = load_in(g_w1, j, HIDDEN, HEAD, DIM, BLOCK)
                before1 = load_in(from_w1 + saved, j, HIDDEN, HEAD, DIM, BLOCK).to(tl.float32) + keep_w * after_w1
                before1 = tl.dot(tl.trans(key), g_z1, before1, input_precision=PRECISION)
                store_in(g_w1, before1, j, HIDDEN, HEAD, DIM, BLOCK)
                of_keep_w += tl.sum(tl.sum(after_w1 * own.to(tl.float32), 1), 0)
                if LIMITED:
                    top = tl.maximum(top, tl.max(tl.max(tl.abs(before1), 1), 0))
                if MOMENTUM:
                    past = load_in(chunk_s1 + saved, j, HIDDEN, HEAD, DIM, BLOCK).to(tl.float32)
                    after_s1 = load_in(g_s1, j, HIDDEN, HEAD, DIM, BLOCK)
                    of_keep_t += tl.sum(tl.sum(after_w1 * past, 1), 0)
                    of_keep_s += tl.sum(tl.sum(after_s1 * past, 1), 0)
                    before1 = load_in(from_s1 + saved, j, HIDDEN, HEAD, DIM, BLOCK).to(tl.float32)
                    before1 += keep_t * after_w1 + keep_s * after_s1
                    store_in(g_s1, before1, j, HIDDEN, HEAD, DIM, BLOCK)
                    if LIMITED:
                        top = tl.maximum(top, tl.max(tl.max(tl.abs(before1), 1), 0))
                a = a.to(key.dtype)
            else:
                a = key
                g_key += g_a
            g_add_w += tl.sum(a.to(tl.float32) * up, 1)
            before = tl.dot(tl.trans(a), g_z2, before, input_precision=PRECISION)
            store_out(g_w2, before, j, HIDDEN, HEAD, DIM, BLOCK)
            of_keep_w += tl.sum(tl.sum(after_w * last.to(tl.float32), 1), 0)
            if LIMITED:
                top = tl.maximum(top, tl.max(tl.max(tl.abs(before), 1), 0))
            if MOMENTUM:
                g_add_s += tl.sum(a.to(tl.float32) * up_of_s, 1)
                past = load_out(chunk_s2 + saved, j, HIDDEN, HEAD, DIM, BLOCK).to(tl.float32)
                of_keep_t += tl.sum(tl.sum(after_w * past, 1), 0)
                of_keep_s += tl.sum(tl.sum(after_s * past, 1), 0)
                before = load_out(from_s2 + saved, j, HIDDEN, HEAD, DIM, BLOCK).to(tl.float32)
                before += keep_t * after_w + keep_s * after_s
                store_out(g_s2, before, j, HIDDEN, HEAD, DIM, BLOCK)
                if LIMITED:
                    top = tl.maximum(top, tl.max(tl.max(tl.abs(before), 1), 0))
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


PART = tl.constexpr(1024)


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
    """The sum of (x / top)^2: the largest first, since an exploding gradient's squares are infinite long before it is."""
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
