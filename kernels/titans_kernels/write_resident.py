"""The write pass with the state in registers: `write_kernel` for Hopper, with explicit layouts.

One program of two warpgroups takes one row. W and S stay in its registers, float32, from the first chunk to the last;
products have their operands in shared memory, and the two warpgroups share out their columns (or the 128 rows of a last
layer), so that nothing is computed twice. Products that do not wait for each other are under way together, and the next
chunk's tokens arrive while this chunk's are written.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM102, SIM108  (Triton works out both sides of `and`, and needs one type for both of `if` and `else`)

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait
from triton.language import debug_barrier

from titans_kernels.activation import activate
from titans_kernels.ahead_of_time import Configuration
from titans_kernels.descent import normalize, output_descent, through_norm
from titans_kernels.write import RESET

WARPS = 8


def supports(dtype: torch.dtype, head: int, hidden: int, depth: int, chunk: int) -> bool:
    """Whether `write_resident_kernel` has a form for this; `chunk` is what tiles are padded to."""
    if dtype != torch.bfloat16 or chunk != 64:
        return False
    return head == 64 and hidden in (64, 128) if depth == 2 else depth == 1 and hidden == head and head in (64, 128)


@gluon.jit
def _unknown_zero(length):
    """Zero, for no chunk has 256 tokens; the compiler does not know, and keeps no addresses for the next chunk."""
    return (length >> 8) * 16


@gluon.jit
def _anew(x):
    """x, int32, which the compiler takes for new: it keeps nothing it has computed from it, nor takes it apart."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _anew_scalar(x):
    """The same for a scalar of int64."""
    return gl.inline_asm_elementwise("mov.b64 $0, $1;", "=l,l", [x], dtype=gl.int64, is_pure=False, pack=1)


@gluon.jit
def _copy_tokens(shared, x, begin, length, heads, zero, WIDTH: gl.constexpr, CHUNK: gl.constexpr, layout: gl.constexpr):
    """Starts to copy tokens [begin, begin + length) of the head at x into (CHUNK, WIDTH), zeros behind them."""
    r = _anew(gl.arange(0, CHUNK, layout=gl.SliceLayout(1, layout)) + zero)
    c = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    at = x + begin.to(gl.int64) * heads * WIDTH + (r[:, None] * (heads * WIDTH) + c[None, :])
    async_copy.async_copy_global_to_shared(shared, at, mask=(r < length)[:, None])


@gluon.jit
def _at(zero, ROWS: gl.constexpr, WIDTH: gl.constexpr, layout: gl.constexpr):
    """Where the elements of a (ROWS, WIDTH) tile are."""
    r = _anew(gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout)) + zero)
    c = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    return r[:, None] * WIDTH + c[None, :]


@gluon.jit
def _scaled(x, gates, zero, CHUNK: gl.constexpr, layout: gl.constexpr):
    """Rows of x (CHUNK, columns), bfloat16, times their gates (CHUNK,)."""
    r = _anew(gl.arange(0, CHUNK, layout=gl.SliceLayout(1, layout)) + zero)
    return (x.to(gl.float32) * gl.load(gates + r)[:, None]).to(gl.bfloat16)


@gluon.jit
def write_resident_kernel(
    k, v, limit, begins, lengths, flags, add, keep, gain, bias,
    w1, s1, w2, s2, begin_w1, begin_s1, begin_w2, begin_s2, chunk_w1, chunk_s1, chunk_w2, chunk_s2, outputs, descents,
    length_t, heads, chunks, first, count,
    HEAD: gl.constexpr, HIDDEN: gl.constexpr, DIM: gl.constexpr, BLOCK: gl.constexpr, CHUNK: gl.constexpr,
    DEPTH: gl.constexpr, MOMENTUM: gl.constexpr, RESIDUAL: gl.constexpr, LOSS: gl.constexpr,
    ACTIVATION: gl.constexpr, STARTS: gl.constexpr, PRECISION: gl.constexpr,
):  # fmt: skip
    """Arguments as of `write_kernel`. BLOCK and PRECISION are not used."""
    gl.static_assert(gl.num_warps() == 8 and CHUNK == 64 and DIM == HEAD)
    PART: gl.constexpr = 64
    bf16: gl.constexpr = gl.bfloat16
    inner: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, HIDDEN // 2, 16])
    part: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, PART // 2, 16])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, HEAD // 2, 16])
    last: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, HEAD, 16]) if HIDDEN == 128 else output
    # Whole rows, 16 bytes a thread, for copies between shared and global memory.
    head_rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD, HEAD // 8], [8, 1], [1, 0])
    inner_rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HIDDEN, HIDDEN // 8], [8, 1], [1, 0])
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    # Each one tile behind an index, which the loop makes unknown: addresses are then made anew in every chunk.
    keys = gl.allocate_shared_memory(bf16, [1, CHUNK, HEAD], swizzled)
    values = gl.allocate_shared_memory(bf16, [1, CHUNK, HEAD], swizzled)
    keys_w = gl.allocate_shared_memory(bf16, [1, CHUNK, HEAD], swizzled)
    downs = gl.allocate_shared_memory(bf16, [1, CHUNK, HEAD], swizzled)
    operands_w2 = gl.allocate_shared_memory(bf16, [1, HIDDEN, HEAD], swizzled)
    if MOMENTUM:
        keys_s = gl.allocate_shared_memory(bf16, [1, CHUNK, HEAD], swizzled)
        operands_s2 = gl.allocate_shared_memory(bf16, [1, HIDDEN, HEAD], swizzled)
    if DEPTH == 2:
        units = gl.allocate_shared_memory(bf16, [1, CHUNK, HIDDEN], swizzled)
        units_w = gl.allocate_shared_memory(bf16, [1, CHUNK, HIDDEN], swizzled)
        pulls = gl.allocate_shared_memory(bf16, [1, CHUNK, HIDDEN], swizzled)
        operands_w1 = gl.allocate_shared_memory(bf16, [1, HEAD, HIDDEN], swizzled)
        if MOMENTUM:
            units_s = gl.allocate_shared_memory(bf16, [1, CHUNK, HIDDEN], swizzled)
            operands_s1 = gl.allocate_shared_memory(bf16, [1, HEAD, HIDDEN], swizzled)

    row = gl.program_id(0).to(gl.int64)
    batch, head = row // heads, row % heads
    size: gl.constexpr = HEAD * HIDDEN
    own = batch * length_t * heads + head
    n = batch * chunks + first
    flag = 0
    begin = gl.load(begins + n)
    length = gl.load(lengths + n)
    if STARTS:
        flag = gl.load(flags + n)
    zero = _unknown_zero(length)
    _copy_tokens(keys.index(zero), k + own * HEAD, begin, length, heads, zero, HEAD, CHUNK, head_rows)
    _copy_tokens(values.index(zero), v + own * HEAD, begin, length, heads, zero, HEAD, CHUNK, head_rows)
    async_copy.commit_group()
    W2 = gl.load(w2 + row * size + _at(zero, HIDDEN, HEAD, last))
    operands_w2.index(zero).store(W2.to(bf16))
    if MOMENTUM:
        S2 = gl.load(s2 + row * size + _at(zero, HIDDEN, HEAD, last))
        operands_s2.index(zero).store(S2.to(bf16))
    if DEPTH == 2:
        W1 = gl.load(w1 + row * size + _at(zero, HEAD, HIDDEN, inner))
        operands_w1.index(zero).store(W1.to(bf16))
        if MOMENTUM:
            S1 = gl.load(s1 + row * size + _at(zero, HEAD, HIDDEN, inner))
            operands_s1.index(zero).store(S1.to(bf16))

    for i in range(count):
        zero = _unknown_zero(length)
        key, value, key_w, d2, w2_now = (
            keys.index(zero),
            values.index(zero),
            keys_w.index(zero),
            downs.index(zero),
            operands_w2.index(zero),
        )
        of_chunk = _anew_scalar(row * count + i)
        own = _anew_scalar(batch * length_t * heads + head)
        saved = of_chunk * size
        if STARTS:
            if (flag & RESET) != 0:
                W2 = gl.load(begin_w2 + row * size + _at(zero, HIDDEN, HEAD, last))
                operands_w2.index(zero).store(W2.to(bf16))
                if MOMENTUM:
                    S2 = gl.load(begin_s2 + row * size + _at(zero, HIDDEN, HEAD, last))
                    operands_s2.index(zero).store(S2.to(bf16))
                if DEPTH == 2:
                    W1 = gl.load(begin_w1 + row * size + _at(zero, HEAD, HIDDEN, inner))
                    operands_w1.index(zero).store(W1.to(bf16))
                    if MOMENTUM:
                        S1 = gl.load(begin_s1 + row * size + _at(zero, HEAD, HIDDEN, inner))
                        operands_s1.index(zero).store(S1.to(bf16))
        gates_w = add + of_chunk * 2 * CHUNK
        gates_s = gates_w + CHUNK
        async_copy.wait_group(0)
        fence_async_shared()
        debug_barrier()

        # The network's output; meanwhile the keys that will be written.
        if DEPTH == 2:
            a, a_w, d1, w1_now = units.index(zero), units_w.index(zero), pulls.index(zero), operands_w1.index(zero)
            empty = gl.zeros([CHUNK, PART], gl.float32, part)
            z1 = warpgroup_mma(key, w1_now.slice(0, PART, 1), empty, is_async=True)
            if HIDDEN > PART:
                z1_next = warpgroup_mma(key, w1_now.slice(PART, PART, 1), empty, is_async=True)
        else:
            z2_now = warpgroup_mma(key, w2_now, gl.zeros([CHUNK, HEAD], gl.float32, output), is_async=True)
        x = key.load(head_rows)
        key_w.store(_scaled(x, gates_w, zero, CHUNK, head_rows))
        if MOMENTUM:
            keys_s.index(zero).store(_scaled(x, gates_s, zero, CHUNK, head_rows))
        if DEPTH == 2:
            for j in gl.static_range(0, HIDDEN, PART):
                if j == 0:
                    z = warpgroup_mma_wait((HIDDEN - PART) // PART, [z1])
                else:
                    z = warpgroup_mma_wait(0, [z1_next])
                active, slope, _ = activate(z, ACTIVATION)
                active = active.to(bf16)
                d1.slice(j, PART, 1).store(slope.to(bf16))  # until the descent is known
                a.slice(j, PART, 1).store(active)
                a_w.slice(j, PART, 1).store(_scaled(active, gates_w, zero, CHUNK, part))
                if MOMENTUM:
                    units_s.index(zero).slice(j, PART, 1).store(_scaled(active, gates_s, zero, CHUNK, part))
            fence_async_shared()
            z2_now = warpgroup_mma(a, w2_now, gl.zeros([CHUNK, HEAD], gl.float32, output), is_async=True)
        keep_w = gl.load(keep + of_chunk * 4)
        keep_t = gl.load(keep + of_chunk * 4 + 1)
        keep_s = gl.load(keep + of_chunk * 4 + 2)
        z2 = warpgroup_mma_wait(0, [z2_now])

        # The descent at the output.
        r = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, output)) + zero
        gl.store(outputs + of_chunk * (CHUNK * HEAD) + _at(zero, CHUNK, HEAD, output), z2, mask=(r < length)[:, None])
        far = r * 0.0
        if LOSS == "huber":
            far = gl.load(limit + own + (begin + r) * heads, mask=r < length, other=1.0)
        if RESIDUAL:
            c = gl.arange(0, HEAD, layout=gl.SliceLayout(0, output)) + zero
            inside = (c >= 0)[None, :]
            normal, rstd = normalize(z2, inside, HEAD)
            gains = gl.load(gain + head * HEAD + c)[None, :]
            f = key.load(output).to(gl.float32) + normal * gains + gl.load(bias + head * HEAD + c)[None, :]
            h = gains * output_descent(f, value.load(output).to(gl.float32), far, LOSS)
            down = through_norm(h, normal, rstd, inside, HEAD)
        else:
            down = output_descent(z2, value.load(output).to(gl.float32), far, LOSS)
        d2.store(down.to(bf16))
        fence_async_shared()

        # The last layer's update and the descent before it; meanwhile what is kept, and the next chunk's tokens.
        if DEPTH == 2:
            pulled = warpgroup_mma(
                d2, w2_now.permute((1, 0)), gl.zeros([CHUNK, HIDDEN], gl.float32, inner), is_async=True
            )
            written, written_s = a_w, units_s.index(zero) if MOMENTUM else a_w
        else:
            written, written_s = key_w, keys_s.index(zero) if MOMENTUM else key_w
        if MOMENTUM:
            W2_next = warpgroup_mma(written.permute((1, 0)), d2, keep_w * W2 + keep_t * S2, is_async=True)
            S2_next = warpgroup_mma(written_s.permute((1, 0)), d2, keep_s * S2, is_async=True)
        else:
            W2_next = warpgroup_mma(written.permute((1, 0)), d2, keep_w * W2, is_async=True)
        n = batch * chunks + first + min(i + 1, count - 1)
        new_begin = gl.load(begins + n)
        new_length = gl.load(lengths + n)
        if STARTS:
            flag = gl.load(flags + n)
        of_rows = _at(zero, HIDDEN, HEAD, head_rows)
        gl.store(chunk_w2 + saved + of_rows, w2_now.load(head_rows))
        if MOMENTUM:
            gl.store(chunk_s2 + saved + of_rows, operands_s2.index(zero).load(head_rows))
        if DEPTH == 2:
            of_rows = _at(zero, HEAD, HIDDEN, inner_rows)
            gl.store(chunk_w1 + saved + of_rows, w1_now.load(inner_rows))
            if MOMENTUM:
                gl.store(chunk_s1 + saved + of_rows, operands_s1.index(zero).load(inner_rows))
        r = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, head_rows)) + zero
        of_rows = of_chunk * (CHUNK * HEAD) + _at(zero, CHUNK, HEAD, head_rows)
        gl.store(descents + of_rows, d2.load(head_rows), mask=(r < length)[:, None])
        _copy_tokens(key, k + own * HEAD, new_begin, new_length, heads, zero, HEAD, CHUNK, head_rows)
        _copy_tokens(value, v + own * HEAD, new_begin, new_length, heads, zero, HEAD, CHUNK, head_rows)
        async_copy.commit_group()
        if DEPTH == 2:
            back = warpgroup_mma_wait(2 if MOMENTUM else 1, [pulled])
            d1.store((back * d1.load(inner).to(gl.float32)).to(bf16))
            fence_async_shared()
            # The first layer's update.
            if MOMENTUM:
                W1_next = warpgroup_mma(key_w.permute((1, 0)), d1, keep_w * W1 + keep_t * S1, is_async=True)
                S1_next = warpgroup_mma(keys_s.index(zero).permute((1, 0)), d1, keep_s * S1, is_async=True)
                W2, S2 = warpgroup_mma_wait(2, [W2_next, S2_next])
            else:
                W1_next = warpgroup_mma(key_w.permute((1, 0)), d1, keep_w * W1, is_async=True)
                W2 = warpgroup_mma_wait(1, [W2_next])
        else:
            if MOMENTUM:
                W2, S2 = warpgroup_mma_wait(0, [W2_next, S2_next])
            else:
                W2 = warpgroup_mma_wait(0, [W2_next])
        w2_now.store(W2.to(bf16))
        if MOMENTUM:
            operands_s2.index(zero).store(S2.to(bf16))
        if DEPTH == 2:
            if MOMENTUM:
                W1, S1 = warpgroup_mma_wait(0, [W1_next, S1_next])
                operands_s1.index(zero).store(S1.to(bf16))
            else:
                W1 = warpgroup_mma_wait(0, [W1_next])
            w1_now.store(W1.to(bf16))
        begin = new_begin
        length = new_length

    async_copy.wait_group(0)
    zero = _unknown_zero(length)
    gl.store(w2 + row * size + _at(zero, HIDDEN, HEAD, last), W2)
    if MOMENTUM:
        gl.store(s2 + row * size + _at(zero, HIDDEN, HEAD, last), S2)
    if DEPTH == 2:
        gl.store(w1 + row * size + _at(zero, HEAD, HIDDEN, inner), W1)
        if MOMENTUM:
            gl.store(s1 + row * size + _at(zero, HEAD, HIDDEN, inner), S1)


SIZES = (("x1", 64, 64, 2), ("x2", 64, 128, 2), ("linear", 64, 64, 1), ("linear head_dim=128", 128, 128, 1))
"""Name, HEAD, HIDDEN and DEPTH."""
OPTIONS: tuple[tuple[str, dict[str, object]], ...] = (
    ("l2", {}),
    ("huber documents", {"LOSS": "huber", "STARTS": True}),
    ("no momentum", {"MOMENTUM": False}),
    ("no norm dot silu", {"RESIDUAL": False, "LOSS": "dot", "ACTIVATION": "silu"}),
)


def configurations() -> Iterator[Configuration]:
    """Every size `supports` knows, with gelu, momentum and norm but where the name says otherwise."""
    for (size, head, hidden, depth), (name, options) in product(SIZES, OPTIONS):
        constants: dict[str, object] = {
            "HEAD": head, "HIDDEN": hidden, "DIM": head, "BLOCK": hidden, "CHUNK": 64, "DEPTH": depth, "MOMENTUM": True,
            "RESIDUAL": True, "LOSS": "l2", "ACTIVATION": "gelu", "STARTS": False, "PRECISION": "tf32x3", **options,
        }  # fmt: skip
        slots = [x + y for x in ("ws" if constants["MOMENTUM"] else "w") for y in "12"[-depth:]]
        types = dict.fromkeys(["k", "v", "descents", *(f"chunk_{x}" for x in slots)], "*bf16")
        types |= dict.fromkeys(["add", "keep", "outputs", *slots], "*fp32")
        types |= dict.fromkeys(["begins", "lengths", "flags"], "*i32")
        types |= dict.fromkeys(["length_t", "heads", "chunks", "first", "count"], "i32")
        if constants["STARTS"]:
            types |= {f"begin_{x}": "*fp32" for x in slots}
        if constants["RESIDUAL"]:
            types |= {"gain": "*fp32", "bias": "*fp32"}
        if constants["LOSS"] == "huber":
            types["limit"] = "*fp32"
        missing = [x for x in write_resident_kernel.arg_names if x not in types and x not in constants]
        constants |= dict.fromkeys(missing)
        yield Configuration(f"write_resident {size} {name}", write_resident_kernel, types, constants, WARPS)
