"""The read pass backward: all chunks at once. What does not wait for the adjoint of the state is done here.

Two kernels, one program per chunk and row each: `queries_backward_kernel` goes from the outputs to the queries,
`reads_backward_kernel` from there to all that was read. Apart they need half the registers.
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
    store_rows,
    store_tokens,
    store_turned,
)


@triton.jit
def queries_backward_kernel(
    g_y, q, k, descents, raw, begins, lengths, write, past, keep, gain, chunk_w1, chunk_s1, chunk_w2, chunk_s2,
    g_q, g_past, g_gain, g_bias, g_raw, inner, pulled, queried, g_inner,
    length_t, heads, chunks, first, count,
    HEAD: tl.constexpr, HIDDEN: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    DEPTH: tl.constexpr, MOMENTUM: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """From g_y (B, T, H, HEAD) to g_q, but for its scores' part, g_past, and g_gain, g_bias (B H, count, HEAD).

    For the next kernels: g_raw (B H, count, CHUNK, HEAD) at the last layer's z of the queries and, at depth 2,
    (B H, count, CHUNK, HIDDEN) each: inner, the keys' z of the first layer, and pulled, their descents before the
    activation's slope; queried, the queries' activations, and g_inner, the gradient at the queries' z.
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
    past_w = tl.load(past + of_chunk * 2 * CHUNK + r)[:, None]
    past_s = tl.load(past + of_chunk * 2 * CHUNK + CHUNK + r)[:, None]
    g_z2 = load_tokens(g_y, begin, length, batch, head, length_t, heads, HEAD, DIM, CHUNK).to(tl.float32)
    if RESIDUAL:
        gains = tl.load(gain + head * HEAD + column, mask=column < HEAD, other=0.0)[None, :]
        z2 = load_tokens(raw, begin, length, batch, head, length_t, heads, HEAD, DIM, CHUNK).to(tl.float32)
        normal, rstd = normalize(z2, inside, HEAD)
        tl.store(g_gain + of_chunk * HEAD + column, tl.sum(g_z2 * normal, 0), mask=column < HEAD)
        tl.store(g_bias + of_chunk * HEAD + column, tl.sum(g_z2, 0), mask=column < HEAD)
        g_z2 = through_norm(g_z2 * gains, normal, rstd, inside, HEAD)
    g_z2 = g_z2.to(query.dtype)
    store_rows(g_raw, g_z2, of_chunk, 0, length, HEAD, DIM, CHUNK)
    if DEPTH == 2:
        key = load_tokens(k, begin, length, batch, head, length_t, heads, HEAD, DIM, CHUNK)
        d2 = load_rows(descents, of_chunk, 0, length, HEAD, DIM, CHUNK)
        seen = tl.load(write + of_chunk * CHUNK * CHUNK + r[:, None] * CHUNK + r[None, :])
        scores = (tl.dot(query, tl.trans(key), input_precision=PRECISION) * seen).to(query.dtype)
        g_scores = (tl.dot(g_z2, tl.trans(d2), input_precision=PRECISION) * seen).to(query.dtype)
    g_query = tl.zeros((CHUNK, DIM), tl.float32)
    g_past_w = tl.zeros((CHUNK,), tl.float32)
    g_past_s = tl.zeros((CHUNK,), tl.float32)
    for unit in range(0, HIDDEN, BLOCK):
        j = tl.multiple_of(unit + tl.load(keep + of_chunk * 4 + 3).to(tl.int32), BLOCK)
        last = load_out(chunk_w2 + saved, j, HIDDEN, HEAD, DIM, BLOCK)
        back_w = tl.dot(g_z2, tl.trans(last), input_precision=PRECISION)
        if MOMENTUM:
            last_s = load_out(chunk_s2 + saved, j, HIDDEN, HEAD, DIM, BLOCK)
            back_s = tl.dot(g_z2, tl.trans(last_s), input_precision=PRECISION)
        if DEPTH == 2:
            own = load_in(chunk_w1 + saved, j, HIDDEN, HEAD, DIM, BLOCK)
            z = tl.dot(key, own, input_precision=PRECISION)
            store_rows(inner, z, of_chunk, j, length, HIDDEN, BLOCK, CHUNK)
            a, slope, _ = activate(z, ACTIVATION)
            d1 = tl.dot(d2, tl.trans(last), input_precision=PRECISION)
            store_rows(pulled, d1, of_chunk, j, length, HIDDEN, BLOCK, CHUNK)
            d1 = (d1 * slope).to(query.dtype)
            g_x = tl.dot(g_scores, a.to(query.dtype), back_w * past_w, input_precision=PRECISION)
            z = tl.dot(query, own, input_precision=PRECISION) * past_w
            if MOMENTUM:
                own_s = load_in(chunk_s1 + saved, j, HIDDEN, HEAD, DIM, BLOCK)
                z += tl.dot(query, own_s, input_precision=PRECISION) * past_s
                g_x += back_s * past_s
            z = tl.dot(scores, d1, z, input_precision=PRECISION)
            x, slope, _ = activate(z, ACTIVATION)
            store_rows(queried, x, of_chunk, j, length, HIDDEN, BLOCK, CHUNK)
            g_past_w += tl.sum(x * back_w, 1)
            if MOMENTUM:
                g_past_s += tl.sum(x * back_s, 1)
            g_z1 = (g_x * slope).to(query.dtype)
            store_rows(g_inner, g_z1, of_chunk, j, length, HIDDEN, BLOCK, CHUNK)
            back_w = tl.dot(g_z1, tl.trans(own), input_precision=PRECISION)
            if MOMENTUM:
                back_s = tl.dot(g_z1, tl.trans(own_s), input_precision=PRECISION)
        g_query += back_w * past_w
        g_past_w += tl.sum(query.to(tl.float32) * back_w, 1)
        if MOMENTUM:
            g_query += back_s * past_s
            g_past_s += tl.sum(query.to(tl.float32) * back_s, 1)
    tl.store(g_past + of_chunk * 2 * CHUNK + r, g_past_w)
    tl.store(g_past + of_chunk * 2 * CHUNK + CHUNK + r, g_past_s)
    if RESIDUAL:
        g_query += load_tokens(g_y, begin, length, batch, head, length_t, heads, HEAD, DIM, CHUNK).to(tl.float32)
    store_rows(g_q, g_query, of_chunk, 0, length, HEAD, DIM, CHUNK)


@triton.jit
def reads_backward_kernel(
    q, k, descents, begins, lengths, write, past, inner, pulled, queried, g_inner, g_raw, g_queries,
    g_q, g_k, g_descents, g_inputs, g_hidden, g_write, g_w1, g_s1, g_w2, g_s2,
    length_t, heads, chunks, first, count,
    HEAD: tl.constexpr, HIDDEN: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    DEPTH: tl.constexpr, MOMENTUM: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From what `queries_backward_kernel` left to g_q (B, T, H, HEAD), with g_queries, and what reads ask of the rest.

    The reads' parts alone: g_k, g_descents (B H, count, CHUNK, HEAD) and, at depth 2, (..., HIDDEN) g_inputs at the
    keys' activations and g_hidden at the first layer's descents; g_w1 ... (B H, count, ...) at each chunk's start.
    g_write is whole.
    """
    n = first + tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    begin = tl.load(begins + batch * chunks + n)
    length = tl.load(lengths + batch * chunks + n)
    of_chunk = row * count + n - first
    saved = of_chunk * HEAD * HIDDEN
    r = tl.arange(0, CHUNK)
    squares = write + of_chunk * CHUNK * CHUNK + r[:, None] * CHUNK + r[None, :]
    g_squares = g_write + of_chunk * CHUNK * CHUNK + r[:, None] * CHUNK + r[None, :]
    query = load_tokens(q, begin, length, batch, head, length_t, heads, HEAD, DIM, CHUNK)
    key = load_tokens(k, begin, length, batch, head, length_t, heads, HEAD, DIM, CHUNK)
    g_z2 = load_rows(g_raw, of_chunk, 0, length, HEAD, DIM, CHUNK)
    d2 = load_rows(descents, of_chunk, 0, length, HEAD, DIM, CHUNK)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    g_scores = tl.dot(g_z2, tl.trans(d2), input_precision=PRECISION)
    if DEPTH == 2:
        # The first layer's gradient at its scores and the last layer's scores are sums over the units.
        seen = tl.load(squares)
        gated = (scores * seen).to(key.dtype)
        g_gated = (g_scores * seen).to(key.dtype)
        of_inner = tl.zeros((CHUNK, CHUNK), tl.float32)
        of_last = tl.zeros((CHUNK, CHUNK), tl.float32)
        for j in range(0, HIDDEN, BLOCK):
            z1 = load_rows(inner, of_chunk, j, length, HIDDEN, BLOCK, CHUNK).to(tl.float32)
            a, slope, _ = activate(z1, ACTIVATION)
            d1 = load_rows(pulled, of_chunk, j, length, HIDDEN, BLOCK, CHUNK).to(tl.float32) * slope
            g_z1 = load_rows(g_inner, of_chunk, j, length, HIDDEN, BLOCK, CHUNK)
            of_inner = tl.dot(g_z1, tl.trans(d1.to(key.dtype)), of_inner, input_precision=PRECISION)
            g_d1 = tl.dot(tl.trans(gated), g_z1, input_precision=PRECISION)
            store_rows(g_hidden, g_d1, of_chunk, j, length, HIDDEN, BLOCK, CHUNK)
            x = load_rows(queried, of_chunk, j, length, HIDDEN, BLOCK, CHUNK)
            of_last = tl.dot(x, tl.trans(a.to(key.dtype)), of_last, input_precision=PRECISION)
            g_a = tl.dot(tl.trans(g_gated), x, input_precision=PRECISION)
            store_rows(g_inputs, g_a, of_chunk, j, length, HIDDEN, BLOCK, CHUNK)
        query = load_tokens(q, begin, length, batch, head, length_t, heads, HEAD, DIM, CHUNK)
        key = load_tokens(k, begin, length, batch, head, length_t, heads, HEAD, DIM, CHUNK)
        d2 = load_rows(descents, of_chunk, 0, length, HEAD, DIM, CHUNK)
        of_write = tl.dot(query, tl.trans(key), input_precision=PRECISION) * of_inner
        of_write += tl.dot(g_z2, tl.trans(d2), input_precision=PRECISION) * of_last
        tl.store(g_squares, of_write)
        scores = of_last
        g_scores = of_inner
    else:
        tl.store(g_squares, scores * g_scores)
    seen = tl.load(squares)
    g_d2 = tl.dot(tl.trans((scores * seen).to(key.dtype)), g_z2, input_precision=PRECISION)
    store_rows(g_descents, g_d2, of_chunk, 0, length, HEAD, DIM, CHUNK)
    g_scores = (g_scores * seen).to(key.dtype)
    g_query = load_rows(g_queries, of_chunk, 0, length, HEAD, DIM, CHUNK)
    g_query = tl.dot(g_scores, key, g_query, input_precision=PRECISION)
    store_tokens(g_q, g_query, begin, length, batch, head, length_t, heads, HEAD, DIM, CHUNK)
    g_key = tl.dot(tl.trans(g_scores), query, input_precision=PRECISION)
    store_rows(g_k, g_key, of_chunk, 0, length, HEAD, DIM, CHUNK)
    past_w = tl.load(past + of_chunk * 2 * CHUNK + r)[:, None]
    past_s = tl.load(past + of_chunk * 2 * CHUNK + CHUNK + r)[:, None]
    for j in range(0, HIDDEN, BLOCK):
        x = query
        if DEPTH == 2:
            x = load_rows(queried, of_chunk, j, length, HIDDEN, BLOCK, CHUNK)
            g_z1 = load_rows(g_inner, of_chunk, j, length, HIDDEN, BLOCK, CHUNK)
            faded = tl.trans((query.to(tl.float32) * past_w).to(key.dtype))
            found = tl.dot(faded, g_z1, input_precision=PRECISION)
            store_in(g_w1 + saved, found, j, HIDDEN, HEAD, DIM, BLOCK)
            if MOMENTUM:
                faded = tl.trans((query.to(tl.float32) * past_s).to(key.dtype))
                found = tl.dot(faded, g_z1, input_precision=PRECISION)
                store_in(g_s1 + saved, found, j, HIDDEN, HEAD, DIM, BLOCK)
        found = tl.dot(tl.trans(g_z2), (x.to(tl.float32) * past_w).to(key.dtype), input_precision=PRECISION)
        store_turned(g_w2 + saved, found, j, HIDDEN, HEAD, DIM, BLOCK)
        if MOMENTUM:
            found = tl.dot(tl.trans(g_z2), (x.to(tl.float32) * past_s).to(key.dtype), input_precision=PRECISION)
            store_turned(g_s2 + saved, found, j, HIDDEN, HEAD, DIM, BLOCK)
