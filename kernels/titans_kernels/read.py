"""The read pass: all chunks at once, one program per chunk and row.

A query x never meets token t's memory, only its products: x W_t = past_w x W_c + past_s x S_c + (write o x a^T) d, with
the chunk's own inputs a and descents d, which are worked out again from the state the chunk began with.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from titans_kernels.activation import activate
from titans_kernels.descent import normalize
from titans_kernels.tiles import load_in, load_out, load_rows, load_tokens, store_tokens


@triton.jit
def read_kernel(
    q, k, descents, begins, lengths, write, past, gain, bias,
    chunk_w1, chunk_s1, chunk_w2, chunk_s2, y, raw,
    length_t, heads, chunks, first, count,
    HEAD: tl.constexpr, HIDDEN: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    DEPTH: tl.constexpr, MOMENTUM: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """q, k (B, T, H, HEAD), descents (B H, count, CHUNK, HEAD) -> outputs y and, before the norm, raw, both like q.

    The rest as in `write_kernel`.
    """
    n = first + tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    begin = tl.load(begins + batch * chunks + n)
    length = tl.load(lengths + batch * chunks + n)
    if length > 0:
        size = HEAD * HIDDEN
        of_chunk = row * count + n - first
        saved = of_chunk * size
        r = tl.arange(0, CHUNK)
        column = tl.arange(0, DIM)
        inside = (column < HEAD)[None, :]
        query = load_tokens(q, begin, length, batch, head, length_t, heads, HEAD, DIM, CHUNK)
        key = load_tokens(k, begin, length, batch, head, length_t, heads, HEAD, DIM, CHUNK)
        d2 = load_rows(descents, of_chunk, 0, length, HEAD, DIM, CHUNK)
        past_w = tl.load(past + of_chunk * 2 * CHUNK + r)[:, None]
        past_s = tl.load(past + of_chunk * 2 * CHUNK + CHUNK + r)[:, None]
        seen = tl.load(write + of_chunk * CHUNK * CHUNK + r[:, None] * CHUNK + r[None, :])
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * seen
        if DEPTH == 2:
            scores1 = scores.to(key.dtype)
            scores = tl.zeros((CHUNK, CHUNK), tl.float32)
        z2 = tl.zeros((CHUNK, DIM), tl.float32)
        for j in range(0, HIDDEN, BLOCK):
            last = load_out(chunk_w2 + saved, j, HIDDEN, HEAD, DIM, BLOCK)
            x = query
            if DEPTH == 2:
                own = load_in(chunk_w1 + saved, j, HIDDEN, HEAD, DIM, BLOCK)
                a, slope, _ = activate(tl.dot(key, own, input_precision=PRECISION), ACTIVATION)
                d1 = (tl.dot(d2, tl.trans(last), input_precision=PRECISION) * slope).to(key.dtype)
                z1 = tl.dot(query, own, input_precision=PRECISION) * past_w
                if MOMENTUM:
                    own = load_in(chunk_s1 + saved, j, HIDDEN, HEAD, DIM, BLOCK)
                    z1 += tl.dot(query, own, input_precision=PRECISION) * past_s
                z1 = tl.dot(scores1, d1, z1, input_precision=PRECISION)
                x, _, _ = activate(z1, ACTIVATION)
                x = x.to(key.dtype)
                scores = tl.dot(x, tl.trans(a.to(key.dtype)), scores, input_precision=PRECISION)
            z2 += tl.dot(x, last, input_precision=PRECISION) * past_w
            if MOMENTUM:
                last = load_out(chunk_s2 + saved, j, HIDDEN, HEAD, DIM, BLOCK)
                z2 += tl.dot(x, last, input_precision=PRECISION) * past_s
        if DEPTH == 2:
            scores = scores * seen
        z2 = tl.dot(scores.to(key.dtype), d2, z2, input_precision=PRECISION)
        if RESIDUAL:
            store_tokens(raw, z2, begin, length, batch, head, length_t, heads, HEAD, DIM, CHUNK)
            gains = tl.load(gain + head * HEAD + column, mask=column < HEAD, other=0.0)[None, :]
            biases = tl.load(bias + head * HEAD + column, mask=column < HEAD, other=0.0)[None, :]
            z2, _ = normalize(z2, inside, HEAD)
            z2 = query.to(tl.float32) + z2 * gains + biases
        store_tokens(y, z2, begin, length, batch, head, length_t, heads, HEAD, DIM, CHUNK)
