"""The write pass: one program takes one row (a head of a sequence) from chunk to chunk.

The state is in global memory, float32, where a row's own 64 KiB to 256 KiB stay in L2; the hidden units go by in blocks
of BLOCK, twice per chunk: once for the network's output, once for the gradients and the update. Kept for the reads: the
state each chunk began with, in the dtype of the products, and the descent at the output.
"""

# ruff: noqa: SIM102  (what is known when compiling is apart from what is known when running)
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from titans_kernels.activation import activate
from titans_kernels.descent import descend
from titans_kernels.tiles import load_in, load_norm, load_tokens, load_turned, store_in, store_rows, store_turned

RESET = tl.constexpr(1)
BORDER = tl.constexpr(2)
PART = tl.constexpr(1024)


@triton.jit
def write_kernel(
    k, v, limit, begins, lengths, flags, add, keep, gain, bias,
    w1, s1, w2, s2, begin_w1, begin_s1, begin_w2, begin_s2, chunk_w1, chunk_s1, chunk_w2, chunk_s2, outputs, descents,
    length_t, heads, chunks, first, count,
    HEAD: tl.constexpr, HIDDEN: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    DEPTH: tl.constexpr, MOMENTUM: tl.constexpr, RESIDUAL: tl.constexpr, LOSS: tl.constexpr,
    ACTIVATION: tl.constexpr, STARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Chunks [first, first + count) of every row. k, v (B, T, H, HEAD); limit (B, T, H); gain, bias (H, HEAD).

    w1 (B H, HEAD, HIDDEN), w2 (B H, HIDDEN, HEAD), s1, s2: the state, changed in place; begin_*: what documents begin
    with. chunk_* (B H, count, ...): each chunk's start. outputs, descents (B H, count, CHUNK, HEAD): the last z of the
    keys, and -dl/dz there.
    """
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    size = HEAD * HIDDEN
    w2 += row * size
    if DEPTH == 2:
        w1 += row * size
    if MOMENTUM:
        s2 += row * size
        if DEPTH == 2:
            s1 += row * size
    column = tl.arange(0, DIM)
    inside = (column < HEAD)[None, :]
    r = tl.arange(0, CHUNK)
    gains, biases = load_norm(gain, bias, head, HEAD, DIM, RESIDUAL)
    for n in range(first, first + count):
        begin = tl.load(begins + batch * chunks + n)
        length = tl.load(lengths + batch * chunks + n)
        of_chunk = row * count + n - first
        saved = of_chunk * size
        if STARTS:
            if (tl.load(flags + batch * chunks + n) & RESET) != 0:
                copy(begin_w2 + row * size, w2, size)
                if DEPTH == 2:
                    copy(begin_w1 + row * size, w1, size)
                if MOMENTUM:
                    copy(begin_s2 + row * size, s2, size)
                    if DEPTH == 2:
                        copy(begin_s1 + row * size, s1, size)
                tl.debug_barrier()
        key = load_tokens(k, begin, length, batch, head, length_t, heads, HEAD, DIM, CHUNK)
        value = load_tokens(v, begin, length, batch, head, length_t, heads, HEAD, DIM, CHUNK)
        z2 = tl.zeros((CHUNK, DIM), tl.float32)
        for j in range(0, HIDDEN, BLOCK):
            a = key
            if DEPTH == 2:
                own = load_in(w1, j, HIDDEN, HEAD, DIM, BLOCK).to(key.dtype)
                a, _, _ = activate(tl.dot(key, own, input_precision=PRECISION), ACTIVATION)
                a = a.to(key.dtype)
            last = load_turned(w2, j, HIDDEN, HEAD, DIM, BLOCK).to(key.dtype)
            z2 = tl.dot(a, tl.trans(last), z2, input_precision=PRECISION)
        far = r * 0.0
        if LOSS == "huber":
            far = tl.load(limit + (batch * length_t + begin + r) * heads + head, mask=r < length, other=1.0)
        d2 = descend(z2, key.to(tl.float32), value.to(tl.float32), far, gains, biases, inside, HEAD, RESIDUAL, LOSS)
        d2 = d2.to(key.dtype)
        store_rows(outputs, z2, of_chunk, 0, length, HEAD, DIM, CHUNK)
        store_rows(descents, d2, of_chunk, 0, length, HEAD, DIM, CHUNK)
        add_w = tl.load(add + of_chunk * 2 * CHUNK + r)[:, None]
        add_s = tl.load(add + of_chunk * 2 * CHUNK + CHUNK + r)[:, None]
        keep_w = tl.load(keep + of_chunk * 4)
        keep_t = tl.load(keep + of_chunk * 4 + 1)
        keep_s = tl.load(keep + of_chunk * 4 + 2)
        tl.debug_barrier()  # what is read above is written below
        for j in range(0, HIDDEN, BLOCK):
            old = load_turned(w2, j, HIDDEN, HEAD, DIM, BLOCK)
            last = old.to(key.dtype)
            store_turned(chunk_w2 + saved, last, j, HIDDEN, HEAD, DIM, BLOCK)
            new = keep_w * old
            a = key.to(tl.float32)
            if DEPTH == 2:
                old = load_in(w1, j, HIDDEN, HEAD, DIM, BLOCK)
                own = old.to(key.dtype)
                store_in(chunk_w1 + saved, own, j, HIDDEN, HEAD, DIM, BLOCK)
                a, slope, _ = activate(tl.dot(key, own, input_precision=PRECISION), ACTIVATION)
                a = a.to(key.dtype).to(tl.float32)  # as the product above and the reads have it
                d1 = (tl.dot(d2, last, input_precision=PRECISION) * slope).to(key.dtype)
                written = tl.trans((key.to(tl.float32) * add_w).to(key.dtype))
                new1 = tl.dot(written, d1, keep_w * old, input_precision=PRECISION)
                if MOMENTUM:
                    past = load_in(s1, j, HIDDEN, HEAD, DIM, BLOCK)
                    store_in(chunk_s1 + saved, past, j, HIDDEN, HEAD, DIM, BLOCK)
                    new1 += keep_t * past
                    written = tl.trans((key.to(tl.float32) * add_s).to(key.dtype))
                    past = tl.dot(written, d1, keep_s * past, input_precision=PRECISION)
                    store_in(s1, past, j, HIDDEN, HEAD, DIM, BLOCK)
                store_in(w1, new1, j, HIDDEN, HEAD, DIM, BLOCK)
            new = tl.dot(tl.trans(d2), (a * add_w).to(key.dtype), new, input_precision=PRECISION)
            if MOMENTUM:
                past = load_turned(s2, j, HIDDEN, HEAD, DIM, BLOCK)
                store_turned(chunk_s2 + saved, past, j, HIDDEN, HEAD, DIM, BLOCK)
                new += keep_t * past
                past = tl.dot(tl.trans(d2), (a * add_s).to(key.dtype), keep_s * past, input_precision=PRECISION)
                store_turned(s2, past, j, HIDDEN, HEAD, DIM, BLOCK)
            store_turned(w2, new, j, HIDDEN, HEAD, DIM, BLOCK)
        tl.debug_barrier()  # the next chunk reads, maybe with other threads, what these have stored


@triton.jit
def copy(source, target, size: tl.constexpr):
    """`size` numbers from one place to the other."""
    for j in range(0, size, PART):
        i = j + tl.arange(0, PART)
        tl.store(target + i, tl.load(source + i, mask=i < size, other=0.0), mask=i < size)
