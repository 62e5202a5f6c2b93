"""The inner loss at the memory's output inside kernels: -dl/dz of one tile of tokens, and its adjoint.

With n = normal(z), f = k + gain n + bias and h = -gain dl/df, the descent is d = rstd (h - mean(h) - n mean(h n)); it
depends on z through f in h, through n beside it and through rstd. Tiles (CHUNK, DIM) in float32; columns from HEAD on
are zero and stay it.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

LOSSES = ("l2", "dot", "huber")
NORM_EPS = tl.constexpr(1e-6)


@triton.jit
def normalize(z, inside, HEAD: tl.constexpr):
    """z with zero mean and unit variance over its first HEAD columns (`inside`), and the reciprocal deviation."""
    centered = tl.where(inside, z - (tl.sum(z, 1) / HEAD)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, 1) / HEAD + NORM_EPS)[:, None]
    return centered * rstd, rstd


@triton.jit
def through_norm(g, n, rstd, inside, HEAD: tl.constexpr):
    """LayerNorm's own backward without gain: rstd (g - mean(g) - n mean(g n))."""
    mean = (tl.sum(g, 1) / HEAD)[:, None]
    along = (tl.sum(g * n, 1) / HEAD)[:, None]
    return tl.where(inside, rstd * (g - mean - n * along), 0.0)


@triton.jit
def _length(e):
    return tl.sqrt(tl.maximum(tl.sum(e * e, 1), 1.1754943508222875e-38))[:, None]


@triton.jit
def output_descent(f, v, limit, LOSS: tl.constexpr):
    """-dl/df; `limit` (CHUNK,) is where Huber's loss becomes linear."""
    if LOSS == "dot":
        return 2.0 * v
    elif LOSS == "l2":
        return 2.0 * (v - f)
    else:
        e = v - f
        size = _length(e)
        return 2.0 * e * tl.where(size <= limit[:, None], 1.0, limit[:, None] / size)


@triton.jit
def descend(z, k, v, limit, gain, bias, inside, HEAD: tl.constexpr, RESIDUAL: tl.constexpr, LOSS: tl.constexpr):
    """-dl/dz for the MLP's outputs z, keys and values; gain and bias (DIM,)."""
    if RESIDUAL:
        n, rstd = normalize(z, inside, HEAD)
        h = gain[None, :] * output_descent(k + n * gain[None, :] + bias[None, :], v, limit, LOSS)
        return through_norm(h, n, rstd, inside, HEAD)
    else:
        return output_descent(z, v, limit, LOSS)


@triton.jit
def descend_back(g, z, k, v, limit, gain, bias, inside, HEAD: tl.constexpr, RESIDUAL: tl.constexpr, LOSS: tl.constexpr):
    """The gradient g at `descend`'s result -> those at z, k, v, limit (CHUNK,), gain and bias (CHUNK, DIM each)."""
    if RESIDUAL:
        n, rstd = normalize(z, inside, HEAD)
        f = k + n * gain[None, :] + bias[None, :]
        outer = output_descent(f, v, limit, LOSS)
        h = outer * gain[None, :]
        d = through_norm(h, n, rstd, inside, HEAD)
        g_h = through_norm(g, n, rstd, inside, HEAD)
        g_outer = g_h * gain[None, :]
    else:
        f = z
        g_outer = g
    if LOSS == "dot":
        g_v = 2.0 * g_outer
        g_f = g_outer * 0.0
        g_limit = tl.sum(g_f, 1)
    elif LOSS == "l2":
        g_v = 2.0 * g_outer
        g_f = -g_v
        g_limit = tl.sum(g_f, 1) * 0.0
    else:
        e = v - f
        size = _length(e)
        unit = e / size
        is_inside = size <= limit[:, None]
        along = tl.sum(unit * g_outer, 1)[:, None]
        g_v = 2.0 * tl.where(is_inside, g_outer, (g_outer - unit * along) * (limit[:, None] / size))
        g_f = -g_v
        g_limit = tl.sum(tl.where(is_inside, 0.0, 2.0 * unit * g_outer), 1)
    if RESIDUAL:
        g_gain = g_h * outer + g_f * n
        mean_hn = (tl.sum(h * n, 1) / HEAD)[:, None]
        mean_gn = (tl.sum(g * n, 1) / HEAD)[:, None]
        mean_gd = (tl.sum(g * d, 1) / HEAD)[:, None]
        g_n = g_f * gain[None, :] - rstd * (g * mean_hn + h * mean_gn)
        g_z = through_norm(g_n, n, rstd, inside, HEAD) - rstd * n * mean_gd
        return g_z, g_f, g_v, g_limit, g_gain, g_f
    else:
        return g_f, g_f * 0.0, g_v, g_limit, g_f, g_f
