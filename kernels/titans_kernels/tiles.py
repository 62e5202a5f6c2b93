"""Loads and stores of tiles, alike in all kernels of the memory.

Layers: the memory's last layer is `w2` (inner width, HEAD); a memory of depth 2 has `w1` (HEAD, HIDDEN) before it, one
of depth 1 does not, and its inner width is HEAD: its "hidden" units are the inputs themselves. S is beside each W.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def load_tokens(x, begin, length, batch, head, length_t, heads, WIDTH: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Tokens [begin, begin + length) of one head of x (B, T, H, WIDTH) -> (CHUNK, PADDED), zero outside."""
    r = tl.arange(0, CHUNK)
    c = tl.arange(0, PADDED)
    at = ((batch * length_t + begin + r) * heads + head)[:, None] * WIDTH + c[None, :]
    return tl.load(x + at, mask=(r < length)[:, None] & (c < WIDTH)[None, :], other=0.0)


@triton.jit
def store_tokens(x, value, begin, length, batch, head, length_t, heads, WIDTH: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """The tile (CHUNK, PADDED) into the tokens of one head of x (B, T, H, WIDTH)."""
    r = tl.arange(0, CHUNK)
    c = tl.arange(0, PADDED)
    at = ((batch * length_t + begin + r) * heads + head)[:, None] * WIDTH + c[None, :]
    tl.store(x + at, value.to(x.dtype.element_ty), mask=(r < length)[:, None] & (c < WIDTH)[None, :])


@triton.jit
def load_rows(x, of_chunk, first, length, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Columns [first, first + BLOCK) of a chunk's tokens in x (B H, count, CHUNK, WIDTH) -> (CHUNK, BLOCK)."""
    r = tl.arange(0, CHUNK)
    c = first + tl.arange(0, BLOCK)
    at = (of_chunk * CHUNK + r)[:, None] * WIDTH + c[None, :]
    return tl.load(x + at, mask=(r < length)[:, None] & (c < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(x, value, of_chunk, first, length, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    r = tl.arange(0, CHUNK)
    c = first + tl.arange(0, BLOCK)
    at = (of_chunk * CHUNK + r)[:, None] * WIDTH + c[None, :]
    tl.store(x + at, value.to(x.dtype.element_ty), mask=(r < length)[:, None] & (c < WIDTH)[None, :])


@triton.jit
def load_in(w, first, WIDTH: tl.constexpr, HEAD: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Columns [first, first + BLOCK) of a first layer (HEAD, WIDTH) -> (DIM, BLOCK)."""
    d = tl.arange(0, DIM)
    c = first + tl.arange(0, BLOCK)
    return tl.load(w + d[:, None] * WIDTH + c[None, :], mask=(d < HEAD)[:, None] & (c < WIDTH)[None, :], other=0.0)


@triton.jit
def store_in(w, value, first, WIDTH: tl.constexpr, HEAD: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    d = tl.arange(0, DIM)
    c = first + tl.arange(0, BLOCK)
    at = w + d[:, None] * WIDTH + c[None, :]
    tl.store(at, value.to(w.dtype.element_ty), mask=(d < HEAD)[:, None] & (c < WIDTH)[None, :])


@triton.jit
def load_out(w, first, WIDTH: tl.constexpr, HEAD: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [first, first + BLOCK) of a last layer (WIDTH, HEAD) -> (BLOCK, DIM)."""
    c = first + tl.arange(0, BLOCK)
    d = tl.arange(0, DIM)
    return tl.load(w + c[:, None] * HEAD + d[None, :], mask=(c < WIDTH)[:, None] & (d < HEAD)[None, :], other=0.0)


@triton.jit
def store_out(w, value, first, WIDTH: tl.constexpr, HEAD: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    c = first + tl.arange(0, BLOCK)
    d = tl.arange(0, DIM)
    at = w + c[:, None] * HEAD + d[None, :]
    tl.store(at, value.to(w.dtype.element_ty), mask=(c < WIDTH)[:, None] & (d < HEAD)[None, :])
