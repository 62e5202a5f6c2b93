"""The write pass: one program takes one row (a head of a sequence) from chunk to chunk.

The state is in global memory, float32, where a row's own 64 KiB to 256 KiB stay in L2; the hidden units go by in blocks
of BLOCK, twice per chunk: once for the network's output, once for the gradients and the update. Kept for the reads: the
state each chunk began with, in the dtype of the products, and the descent at the output.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from titans_kernels.activation import activate
from titans_kernels.descent import descend
from titans_kernels.tiles import load_in, load_out, load_tokens, store_in, store_out, store_rows

RESET = tl.constexpr(1)
BORDER = tl.constexpr(2)


@triton.jit
def write_kernel(
    k, v, limit, begins, lengths, flags, add, keep, gain, bias,
    w1, s1, w2, s2, begin_w1, begin_s1, begin_w2, begin_s2, chunk_w1, chunk_s1, chunk_w2, chunk_s2, descents,
    length_t, heads, chunks, first, count,
    HEAD: tl.constexpr, HIDDEN: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    DEPTH: tl.constexpr, MOMENTUM: tl.constexpr, RESIDUAL: tl.constexpr, LOSS: tl.constexpr,
    ACTIVATION: tl.constexpr, STARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Chunks [first, first + count) of every row. k, v (B, T, H, HEAD); limit (B, T, H); gain, bias (H, HEAD).

    w1 (B H, HEAD, HIDDEN), w2 (B H, HIDDEN, HEAD), s1, s2: the state, changed in place; begin_*: what documents begin
    with; chunk_* (B H, count, ...): each chunk's start; descents (B H, count, CHUNK, HEAD): -dl/dz at the output.
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
    gains = column * 0.0
    biases = column * 0.0
    if RESIDUAL:
        gains = tl.load(gain + head * HEAD + column, mask=column < HEAD, other=0.0)
        biases = tl.load(bias + head * HEAD + column, mask=column < HEAD, other=0.0)
    for n in range(first, first + count):
        begin = tl.load(begins + batch * chunks + n)
        length = tl.load(lengths + batch * chunks + n)
        of_chunk = row * count + n - first
        saved = of_chunk * size
        if STARTS:
            if (tl.load(flags + batch * chunks + n) & RESET) != 0:
                for j in range(0, HIDDEN, BLOCK):
                    store_out(w2, load_out(begin_w2 + row * size, j, HIDDEN, HEAD, DIM, BLOCK), j, HIDDEN, HEAD, DIM, BLOCK)  # fmt: skip
                    if MOMENTUM:
                        store_out(s2, load_out(begin_s2 + row * size, j, HIDDEN, HEAD, DIM, BLOCK), j, HIDDEN, HEAD, DIM, BLOCK)  # fmt: skip
                    if DEPTH == 2:
                        store_in(w1, load_in(begin_w1 + row * size, j, HIDDEN, HEAD, DIM, BLOCK), j, HIDDEN, HEAD, DIM, BLOCK)  # fmt: skip
                        if MOMENTUM:
                            store_in(s1, load_in(begin_s1 + row * size, j, HIDDEN, HEAD, DIM, BLOCK), j, HIDDEN, HEAD, DIM, BLOCK)  # fmt: skip
                tl.debug_barrier()
        key = load_tokens(k, begin, length, batch, head, length_t, heads, HEAD, DIM, CHUNK)
        value = load_tokens(v, begin, length, batch, head, length_t, heads, HEAD, DIM, CHUNK)
        z2 = tl.zeros((CHUNK, DIM), tl.float32)
        for j in range(0, HIDDEN, BLOCK):
            last = load_out(w2, j, HIDDEN, HEAD, DIM, BLOCK).to(key.dtype)
            if DEPTH == 2:
                own = load_in(w1, j, HIDDEN, HEAD, DIM, BLOCK).to(key.dtype)
                a, _, _ = activate(tl.dot(key, own, input_precision=PRECISION), ACTIVATION)
                z2 = tl.dot(a.to(key.dtype), last, z2, input_precision=PRECISION)
            else:
                z2 = tl.dot(key, last, z2, input_precision=PRECISION)
        far = r * 0.0
        if LOSS == "huber":
            far = tl.load(limit + (batch * length_t + begin + r) * heads + head, mask=r < length, other=1.0)
        d2 = descend(z2, key.to(tl.float32), value.to(tl.float32), far, gains, biases, inside, HEAD, RESIDUAL, LOSS)
        d2 = d2.to(key.dtype)
        store_rows(descents, d2, of_chunk, 0, length, HEAD, DIM, CHUNK)
        add_w = tl.load(add + of_chunk * 2 * CHUNK + r)[:, None]
        add_s = tl.load(add + of_chunk * 2 * CHUNK + CHUNK + r)[:, None]
        keep_w = tl.load(keep + of_chunk * 4)
        keep_t = tl.load(keep + of_chunk * 4 + 1)
        keep_s = tl.load(keep + of_chunk * 4 + 2)
        for j in range(0, HIDDEN, BLOCK):
            old = load_out(w2, j, HIDDEN, HEAD, DIM, BLOCK)
            last = old.to(key.dtype)
            store_out(chunk_w2 + saved, last, j, HIDDEN, HEAD, DIM, BLOCK)
            a = key.to(tl.float32)
            if DEPTH == 2:
                old1 = load_in(w1, j, HIDDEN, HEAD, DIM, BLOCK)
                own = old1.to(key.dtype)
                store_in(chunk_w1 + saved, own, j, HIDDEN, HEAD, DIM, BLOCK)
                a, slope, _ = activate(tl.dot(key, own, input_precision=PRECISION), ACTIVATION)
                a = a.to(key.dtype).to(tl.float32)  # as the products above and the reads have it
                d1 = (tl.dot(d2, tl.trans(last), input_precision=PRECISION) * slope).to(key.dtype)
                written = tl.trans((key.to(tl.float32) * add_w).to(key.dtype))
                if MOMENTUM:
                    past1 = load_in(s1, j, HIDDEN, HEAD, DIM, BLOCK)
                    store_in(chunk_s1 + saved, past1, j, HIDDEN, HEAD, DIM, BLOCK)
                    store_in(w1, tl.dot(written, d1, keep_w * old1 + keep_t * past1, input_precision=PRECISION), j, HIDDEN, HEAD, DIM, BLOCK)  # fmt: skip
                    written = tl.trans((key.to(tl.float32) * add_s).to(key.dtype))
                    store_in(s1, tl.dot(written, d1, keep_s * past1, input_precision=PRECISION), j, HIDDEN, HEAD, DIM, BLOCK)  # fmt: skip
                else:
                    store_in(w1, tl.dot(written, d1, keep_w * old1, input_precision=PRECISION), j, HIDDEN, HEAD, DIM, BLOCK)  # fmt: skip
            written = tl.trans((a * add_w).to(key.dtype))
            if MOMENTUM:
                past2 = load_out(s2, j, HIDDEN, HEAD, DIM, BLOCK)
                store_out(chunk_s2 + saved, past2, j, HIDDEN, HEAD, DIM, BLOCK)
                store_out(w2, tl.dot(written, d2, keep_w * old + keep_t * past2, input_precision=PRECISION), j, HIDDEN, HEAD, DIM, BLOCK)  # fmt: skip
                written = tl.trans((a * add_s).to(key.dtype))
                store_out(s2, tl.dot(written, d2, keep_s * past2, input_precision=PRECISION), j, HIDDEN, HEAD, DIM, BLOCK)  # fmt: skip
            else:
                store_out(w2, tl.dot(written, d2, keep_w * old, input_precision=PRECISION), j, HIDDEN, HEAD, DIM, BLOCK)  # fmt: skip
        tl.debug_barrier()  # the next chunk reads, maybe with other threads, what these have stored
