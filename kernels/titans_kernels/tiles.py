"""Loads and stores of tiles, alike in all kernels of the memory.

Layers: the memory's last layer is `w2` (inner width, HEAD); a memory of depth 2 has `w1` (HEAD, HIDDEN) before it, one
of depth 1 does not, and its inner width is HEAD: its "hidden" units are the inputs themselves. S is beside each W.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _inside(r, c, length, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    if WIDTH % BLOCK == 0:
        return (r < length)[:, None]
    else:
        return (r < length)[:, None] & (c < WIDTH)[None, :]


@triton.jit
def load_tokens(
    x, begin, length, batch, head, length_t, heads, WIDTH: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr
):
    """Tokens [begin, begin + length) of one head of x (B, T, H, WIDTH) -> (CHUNK, PADDED), zero outside."""
    r = tl.arange(0, CHUNK)
    c = tl.arange(0, PADDED)
    x += ((batch * length_t + begin) * heads + head) * WIDTH
    return tl.load(x + r[:, None] * (heads * WIDTH) + c[None, :], mask=_inside(r, c, length, WIDTH, PADDED), other=0.0)


@triton.jit
def store_tokens(
    x,
    value,
    begin,
    length,
    batch,
    head,
    length_t,
    heads,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The tile (CHUNK, PADDED) into the tokens of one head of x (B, T, H, WIDTH)."""
    r = tl.arange(0, CHUNK)
    c = tl.arange(0, PADDED)
    x += ((batch * length_t + begin) * heads + head) * WIDTH
    at = x + r[:, None] * (heads * WIDTH) + c[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=_inside(r, c, length, WIDTH, PADDED))


@triton.jit
def load_rows(x, of_chunk, first, length, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Columns [first, first + BLOCK) of a chunk's tokens in x (B H, count, CHUNK, WIDTH) -> (CHUNK, BLOCK)."""
    r = tl.arange(0, CHUNK)
    c = first + tl.arange(0, BLOCK)
    x += of_chunk * (CHUNK * WIDTH)
    return tl.load(x + r[:, None] * WIDTH + c[None, :], mask=_inside(r, c, length, WIDTH, BLOCK), other=0.0)


@triton.jit
def store_rows(x, value, of_chunk, first, length, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    r = tl.arange(0, CHUNK)
    c = first + tl.arange(0, BLOCK)
    x += of_chunk * (CHUNK * WIDTH)
    at = x + r[:, None] * WIDTH + c[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=_inside(r, c, length, WIDTH, BLOCK))


@triton.jit
def load_in(w, first, WIDTH: tl.constexpr, HEAD: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Columns [first, first + BLOCK) of a first layer (HEAD, WIDTH) -> (DIM, BLOCK)."""
    d = tl.arange(0, DIM)
    c = first + tl.arange(0, BLOCK)
    at = w + d[:, None] * WIDTH + c[None, :]
    if HEAD == DIM and WIDTH % BLOCK == 0:
        return tl.load(at)
    else:
        return tl.load(at, mask=(d < HEAD)[:, None] & (c < WIDTH)[None, :], other=0.0)


@triton.jit
def store_in(w, value, first, WIDTH: tl.constexpr, HEAD: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    d = tl.arange(0, DIM)
    c = first + tl.arange(0, BLOCK)
    at = w + d[:, None] * WIDTH + c[None, :]
    if HEAD == DIM and WIDTH % BLOCK == 0:
        tl.store(at, value.to(w.dtype.element_ty))
    else:
        tl.store(at, value.to(w.dtype.element_ty), mask=(d < HEAD)[:, None] & (c < WIDTH)[None, :])


@triton.jit
def load_out(w, first, WIDTH: tl.constexpr, HEAD: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [first, first + BLOCK) of a last layer (WIDTH, HEAD) -> (BLOCK, DIM)."""
    c = first + tl.arange(0, BLOCK)
    d = tl.arange(0, DIM)
    at = w + c[:, None] * HEAD + d[None, :]
    if HEAD == DIM and WIDTH % BLOCK == 0:
        return tl.load(at)
    else:
        return tl.load(at, mask=(c < WIDTH)[:, None] & (d < HEAD)[None, :], other=0.0)


@triton.jit
def load_turned(w, first, WIDTH: tl.constexpr, HEAD: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """As `load_out`, transposed: (DIM, BLOCK), so that sums over tokens have DIM rows, which wgmma takes."""
    d = tl.arange(0, DIM)
    c = first + tl.arange(0, BLOCK)
    at = w + c[None, :] * HEAD + d[:, None]
    if HEAD == DIM and WIDTH % BLOCK == 0:
        return tl.load(at)
    else:
        return tl.load(at, mask=(c < WIDTH)[None, :] & (d < HEAD)[:, None], other=0.0)


@triton.jit
def store_turned(w, value, first, WIDTH: tl.constexpr, HEAD: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    d = tl.arange(0, DIM)
    c = first + tl.arange(0, BLOCK)
    at = w + c[None, :] * HEAD + d[:, None]
    if HEAD == DIM and WIDTH % BLOCK == 0:
        tl.store(at, value.to(w.dtype.element_ty))
    else:
        tl.store(at, value.to(w.dtype.element_ty), mask=(c < WIDTH)[None, :] & (d < HEAD)[:, None])


@triton.jit
def load_norm(gain, bias, head, HEAD: tl.constexpr, DIM: tl.constexpr, RESIDUAL: tl.constexpr):
    """A head's gain and bias (DIM,); zeros where there is no norm."""
    d = tl.arange(0, DIM)
    if RESIDUAL:
        gains = tl.load(gain + head * HEAD + d, mask=d < HEAD, other=0.0)
        return gains, tl.load(bias + head * HEAD + d, mask=d < HEAD, other=0.0)
    else:
        return d * 0.0, d * 0.0
