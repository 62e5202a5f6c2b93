"""What of every write and of the past reaches each token of a chunk: the gates in closed form, by their recurrence.

With S_t = eta_t S_{t-1} + theta_t u_t and W_t = (1 - alpha_t) W_{t-1} + S_t, row t of `write` says how much of each u_i
is in W_t, `past` how much of W_c and of S_c. One program does one chunk of one row, token by token, its row of weights
in registers: nothing is divided, no logarithm is taken, nothing underflows that is not zero. A chunk of no tokens keeps
the state as it is.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

READS = ("after", "before", "start")


@triton.jit
def _step(w, s, kept, taken, fade, alpha, eta, theta, token, is_own, FORGETS: tl.constexpr, MOMENTUM: tl.constexpr):
    """One token: what of each write is in W and in S (CHUNK,), and of W_c and S_c in W, of S_c in S."""
    if FORGETS:
        left = 1.0 - tl.load(alpha + token)
        kept = left * kept
        w = left * w
        taken = left * taken
    if MOMENTUM:
        ratio = tl.load(eta + token)
        s = ratio * s
        fade = ratio * fade
        taken = taken + fade
    else:
        s = s * 0.0
    s = tl.where(is_own, tl.load(theta + token), s)
    return w + s, s, kept, taken, fade


@triton.jit
def gates_kernel(
    alpha, eta, theta, begins, lengths, write, past, add, keep, length_t, heads, chunks, first, count,
    CHUNK: tl.constexpr, FORGETS: tl.constexpr, MOMENTUM: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    """Gates (B, T, H) of the chunks [first, first + count) -> write (B H, count, CHUNK, CHUNK), past and add
    (B H, count, 2, CHUNK), keep (B H, count, 4).

    begins, lengths (B, N): the chunks. `past` and `write` are as reads see them, `add` and `keep` as the chunk's end
    does; keep = (W from W, W from S, S from S, 0).
    """
    n = first + tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    begin = tl.load(begins + batch * chunks + n)
    length = tl.load(lengths + batch * chunks + n)
    i = tl.arange(0, CHUNK)
    of_chunk = row * count + n - first
    rows = write + of_chunk * CHUNK * CHUNK
    pasts = past + of_chunk * 2 * CHUNK
    token = (batch * length_t + begin) * heads + head
    w = tl.zeros((CHUNK,), tl.float32)
    s = tl.zeros((CHUNK,), tl.float32)
    kept, taken, fade = 1.0, 0.0, 1.0
    for t in range(0, length):
        if READ == "before":
            tl.store(rows + t * CHUNK + i, w)
            tl.store(pasts + t, kept)
            tl.store(pasts + CHUNK + t, taken)
        w, s, kept, taken, fade = _step(w, s, kept, taken, fade, alpha, eta, theta, token, i == t, FORGETS, MOMENTUM)
        if READ == "after":
            tl.store(rows + t * CHUNK + i, w)
            tl.store(pasts + t, kept)
            tl.store(pasts + CHUNK + t, taken)
        if READ == "start":
            tl.store(rows + t * CHUNK + i, w * 0.0)
            tl.store(pasts + t, 1.0)
            tl.store(pasts + CHUNK + t, 0.0)
        token += heads
    for t in range(length, CHUNK):
        tl.store(rows + t * CHUNK + i, w * 0.0)
        tl.store(pasts + t, 0.0)
        tl.store(pasts + CHUNK + t, 0.0)
    tl.store(add + of_chunk * 2 * CHUNK + i, w)
    tl.store(add + of_chunk * 2 * CHUNK + CHUNK + i, s)
    tl.store(keep + of_chunk * 4, kept)
    tl.store(keep + of_chunk * 4 + 1, taken)
    tl.store(keep + of_chunk * 4 + 2, fade)
    tl.store(keep + of_chunk * 4 + 3, 0.0)


@triton.jit
def gates_backward_kernel(
    alpha, eta, theta, begins, lengths, g_write, g_past, g_add, g_keep, g_alpha, g_eta, g_theta, scratch,
    length_t, heads, chunks, first, count, total,
    CHUNK: tl.constexpr, FORGETS: tl.constexpr, MOMENTUM: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    """The adjoint of `gates_kernel`. scratch (programs, 2 CHUNK + 4, CHUNK): each program's own rows, kept on the way.

    The `total` = B H count chunks are shared out among the programs, so that the scratch stays small.
    """
    i = tl.arange(0, CHUNK)
    program = tl.program_id(0).to(tl.int64)
    own = scratch + program * (2 * CHUNK + 4) * CHUNK
    scalars = own + 2 * CHUNK * CHUNK
    for index in range(tl.program_id(0), total, tl.num_programs(0)):
        of_chunk = program * 0 + index  # 64 bits
        row, n = of_chunk // count, first + of_chunk % count
        batch, head = row // heads, row % heads
        begin = tl.load(begins + batch * chunks + n)
        length = tl.load(lengths + batch * chunks + n)
        token = (batch * length_t + begin) * heads + head
        w = tl.zeros((CHUNK,), tl.float32)
        s = tl.zeros((CHUNK,), tl.float32)
        kept, taken, fade = 1.0, 0.0, 1.0
        tl.debug_barrier()
        for t in range(0, length):
            tl.store(own + t * CHUNK + i, w)
            tl.store(own + (CHUNK + t) * CHUNK + i, s)
            tl.store(scalars + t, kept)
            tl.store(scalars + CHUNK + t, taken)
            tl.store(scalars + 2 * CHUNK + t, fade)
            w, s, kept, taken, fade = _step(
                w, s, kept, taken, fade, alpha, eta, theta, token, i == t, FORGETS, MOMENTUM
            )
            token += heads
        tl.debug_barrier()
        g_w = tl.load(g_add + of_chunk * 2 * CHUNK + i)
        g_s = tl.load(g_add + of_chunk * 2 * CHUNK + CHUNK + i)
        g_kept = tl.load(g_keep + of_chunk * 4)
        g_taken = tl.load(g_keep + of_chunk * 4 + 1)
        g_fade = tl.load(g_keep + of_chunk * 4 + 2)
        rows = g_write + of_chunk * CHUNK * CHUNK
        pasts = g_past + of_chunk * 2 * CHUNK
        for back in range(0, length):
            t = length - 1 - back
            token -= heads
            if READ == "after":
                g_w += tl.load(rows + t * CHUNK + i)
                g_kept += tl.load(pasts + t)
                g_taken += tl.load(pasts + CHUNK + t)
            g_s += g_w
            tl.store(g_theta + token, tl.sum(tl.where(i == t, g_s, 0.0), 0))
            g_s = tl.where(i == t, 0.0, g_s)
            if MOMENTUM:
                g_fade += g_taken
                before = tl.load(own + (CHUNK + t) * CHUNK + i)
                ratio = tl.load(eta + token)
                tl.store(g_eta + token, tl.sum(g_s * before, 0) + g_fade * tl.load(scalars + 2 * CHUNK + t))
                g_s = ratio * g_s
                g_fade = ratio * g_fade
            else:
                g_s = g_s * 0.0
            if FORGETS:
                before = tl.load(own + t * CHUNK + i)
                of_left = tl.sum(g_w * before, 0) + g_kept * tl.load(scalars + t)
                of_left += g_taken * tl.load(scalars + CHUNK + t)
                tl.store(g_alpha + token, -of_left)
                left = 1.0 - tl.load(alpha + token)
                g_w = left * g_w
                g_kept = left * g_kept
                g_taken = left * g_taken
            if READ == "before":
                g_w += tl.load(rows + t * CHUNK + i)
                g_kept += tl.load(pasts + t)
                g_taken += tl.load(pasts + CHUNK + t)
