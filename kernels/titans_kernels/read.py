"""The read pass, and its gradient: all chunks at once, one program per chunk and row.

A query x never meets token t's memory, only its products: x W_t = past_w x W_c + past_s x S_c + (write o x a^T) d, with
the chunk's own inputs a and descents d, which are worked out again from the state the chunk began with.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from titans_kernels.activation import activate
from titans_kernels.descent import normalize, through_norm
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


@triton.jit
def read_kernel(
    q, k, descents, begins, lengths, write, past, gain, bias,
    chunk_w1, chunk_s1, chunk_w2, chunk_s2, y, raw,
    length_t, heads, chunks, first, count,
    HEAD: tl.constexpr, HIDDEN: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    DEPTH: tl.constexpr, MOMENTUM: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """q, k (B, T, H, HEAD), descents (B H, count, CHUNK, HEAD) -> outputs y and, before the norm, raw (B, T, H, HEAD); see `write_kernel`."""
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


@triton.jit
def read_backward_kernel(
    g_y, q, k, descents, raw, begins, lengths, write, past, gain,
    chunk_w1, chunk_s1, chunk_w2, chunk_s2,
    g_q, g_k, g_descents, g_inputs, g_hidden, g_write, g_past, g_w1, g_s1, g_w2, g_s2, g_gain, g_bias,
    length_t, heads, chunks, first, count,
    HEAD: tl.constexpr, HIDDEN: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    DEPTH: tl.constexpr, MOMENTUM: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """From g_y (B, T, H, HEAD) to what the reads alone ask of everything else.

    g_q is whole; g_k, g_descents (B H, count, CHUNK, HEAD), at depth 2 g_inputs and g_hidden (..., HIDDEN), at the hidden
    units of the keys and their descents, are the reads' part; g_w1 ... (B H, count, ...) at each chunk's start;
    g_write, g_past as `gates_kernel` has them; g_gain, g_bias (B H, count, HEAD) one sum per chunk.
    """
    n = first + tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    begin = tl.load(begins + batch * chunks + n)
    length = tl.load(lengths + batch * chunks + n)
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
    g_out = load_tokens(g_y, begin, length, batch, head, length_t, heads, HEAD, DIM, CHUNK).to(tl.float32)
    g_z2 = g_out
    if RESIDUAL:
        gains = tl.load(gain + head * HEAD + column, mask=column < HEAD, other=0.0)[None, :]
        z2 = load_tokens(raw, begin, length, batch, head, length_t, heads, HEAD, DIM, CHUNK).to(tl.float32)
        normal, rstd = normalize(z2, inside, HEAD)
        g_z2 = through_norm(g_out * gains, normal, rstd, inside, HEAD)
        tl.store(g_gain + of_chunk * HEAD + column, tl.sum(g_out * normal, 0), mask=column < HEAD)
        tl.store(g_bias + of_chunk * HEAD + column, tl.sum(g_out, 0), mask=column < HEAD)
    g_z2 = g_z2.to(key.dtype)
    g_scores2 = tl.dot(g_z2, tl.trans(d2), input_precision=PRECISION)
    scores1 = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    of_w = tl.zeros((CHUNK, DIM), tl.float32)  # at the queries, by way of W and of S
    of_s = tl.zeros((CHUNK, DIM), tl.float32)
    g_past_w = tl.zeros((CHUNK,), tl.float32)
    g_past_s = tl.zeros((CHUNK,), tl.float32)
    scores2 = scores1
    g_scores1 = g_scores2
    if DEPTH == 2:
        scores2 = tl.zeros((CHUNK, CHUNK), tl.float32)
        g_scores1 = tl.zeros((CHUNK, CHUNK), tl.float32)
        gated1 = (scores1 * seen).to(key.dtype)
        gated2 = (g_scores2 * seen).to(key.dtype)
    for j in range(0, HIDDEN, BLOCK):
        last = load_out(chunk_w2 + saved, j, HIDDEN, HEAD, DIM, BLOCK)
        back_w = tl.dot(g_z2, tl.trans(last), input_precision=PRECISION)
        if MOMENTUM:
            last_s = load_out(chunk_s2 + saved, j, HIDDEN, HEAD, DIM, BLOCK)
            back_s = tl.dot(g_z2, tl.trans(last_s), input_precision=PRECISION)
        if DEPTH == 2:
            own = load_in(chunk_w1 + saved, j, HIDDEN, HEAD, DIM, BLOCK)
            a, slope, _ = activate(tl.dot(key, own, input_precision=PRECISION), ACTIVATION)
            a = a.to(key.dtype)
            d1 = (tl.dot(d2, tl.trans(last), input_precision=PRECISION) * slope).to(key.dtype)
            z1 = tl.dot(query, own, input_precision=PRECISION) * past_w
            if MOMENTUM:
                own_s = load_in(chunk_s1 + saved, j, HIDDEN, HEAD, DIM, BLOCK)
                z1 += tl.dot(query, own_s, input_precision=PRECISION) * past_s
            z1 = tl.dot(gated1, d1, z1, input_precision=PRECISION)
            x, x_slope, _ = activate(z1, ACTIVATION)
            g_x = tl.dot(gated2, a, back_w * past_w, input_precision=PRECISION)
            g_past_w += tl.sum(x * back_w, 1)
            if MOMENTUM:
                g_x += back_s * past_s
                g_past_s += tl.sum(x * back_s, 1)
            x = x.to(key.dtype)
            g_z1 = (g_x * x_slope).to(key.dtype)
            scores2 = tl.dot(x, tl.trans(a), scores2, input_precision=PRECISION)
            g_scores1 = tl.dot(g_z1, tl.trans(d1), g_scores1, input_precision=PRECISION)
            of_w = tl.dot(g_z1, tl.trans(own), of_w, input_precision=PRECISION)
            g_a = tl.dot(tl.trans(gated2), x, input_precision=PRECISION)
            store_rows(g_inputs, g_a, of_chunk, j, length, HIDDEN, BLOCK, CHUNK)
            g_d1 = tl.dot(tl.trans(gated1), g_z1, input_precision=PRECISION)
            store_rows(g_hidden, g_d1, of_chunk, j, length, HIDDEN, BLOCK, CHUNK)
            faded = tl.trans((query.to(tl.float32) * past_w).to(key.dtype))
            store_in(g_w1 + saved, tl.dot(faded, g_z1, input_precision=PRECISION), j, HIDDEN, HEAD, DIM, BLOCK)
            if MOMENTUM:
                of_s = tl.dot(g_z1, tl.trans(own_s), of_s, input_precision=PRECISION)
                faded = tl.trans((query.to(tl.float32) * past_s).to(key.dtype))
                store_in(g_s1 + saved, tl.dot(faded, g_z1, input_precision=PRECISION), j, HIDDEN, HEAD, DIM, BLOCK)
        else:
            x = query
            of_w += back_w
            if MOMENTUM:
                of_s += back_s
        faded = tl.trans((x.to(tl.float32) * past_w).to(key.dtype))
        store_out(g_w2 + saved, tl.dot(faded, g_z2, input_precision=PRECISION), j, HIDDEN, HEAD, DIM, BLOCK)
        if MOMENTUM:
            faded = tl.trans((x.to(tl.float32) * past_s).to(key.dtype))
            store_out(g_s2 + saved, tl.dot(faded, g_z2, input_precision=PRECISION), j, HIDDEN, HEAD, DIM, BLOCK)
    g_past_w += tl.sum(query.to(tl.float32) * of_w, 1)
    g_query = of_w * past_w
    if MOMENTUM:
        g_past_s += tl.sum(query.to(tl.float32) * of_s, 1)
        g_query += of_s * past_s
    of_write = scores1 * g_scores1
    if DEPTH == 2:
        of_write += scores2 * g_scores2
    tl.store(g_write + of_chunk * CHUNK * CHUNK + r[:, None] * CHUNK + r[None, :], of_write)
    tl.store(g_past + of_chunk * 2 * CHUNK + r, g_past_w)
    tl.store(g_past + of_chunk * 2 * CHUNK + CHUNK + r, g_past_s)
    g_d2 = tl.dot(tl.trans((scores2 * seen).to(key.dtype)), g_z2, input_precision=PRECISION)
    store_rows(g_descents, g_d2, of_chunk, 0, length, HEAD, DIM, CHUNK)
    g_scores1 = (g_scores1 * seen).to(key.dtype)
    g_query = tl.dot(g_scores1, key, g_query, input_precision=PRECISION)
    if RESIDUAL:
        g_query += g_out
    store_tokens(g_q, g_query, begin, length, batch, head, length_t, heads, HEAD, DIM, CHUNK)
    g_key = tl.dot(tl.trans(g_scores1), query, input_precision=PRECISION)
    store_rows(g_k, g_key, of_chunk, 0, length, HEAD, DIM, CHUNK)
