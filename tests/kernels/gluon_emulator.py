"""Runs Gluon kernels for Hopper on the CPU, in torch, and finds the races a GPU might show or might not.

Triton's interpreter does not know Gluon. Here the Python function behind a kernel is called with other globals: tiles
in registers are torch tensors that keep their layouts, pointers are offsets into a tensor, shared memory is a tensor
with a history. As in Gluon, tiles meet only in one layout. All floats are of one torch dtype; bfloat16 is rounded to,
or, in exact mode, is not.

What goes between warps through shared memory is checked by the order of events. All threads take the same way, so that
an order in the program's text is one in time:

- What is read has been written; global memory is accessed inside of its tensor.
- wgmma reads through another proxy than ld and st. Whoever wrote by st or cp.async has to have a fence, then all a
  barrier, before wgmma reads. (Some hardware forgives a fence behind the barrier; the emulator does not.)
- An asynchronous wgmma reads until its group was waited for. Before anybody writes there again, all warps have to have
  waited, and met at a barrier after it. A result cannot be used before it was waited for.
- cp.async writes until its group was waited for; others see it after a barrier.

Barriers are the kernel's own, those inside reductions over warps, and those which the compiler adds. It adds one
after each wait for cp.async, and one before an access to shared memory that overlaps an earlier one, if one of them is
a write and no barrier was between (`MembarAnalysis`, lib/Analysis/Membar.cpp). To it an asynchronous wgmma is over
where it starts, and fences are not its concern: those are the errors to be found here. The compiler also adds the
missing fence of a wgmma (`ProxyFenceInsertionPass`), but right before it, behind the barrier: the emulator does not
count on that. The compiler looks at the program's text: where one way of a branch needs a barrier, both have it. Here
only the way that was taken counts, so every branch should be taken by some test. What the compiler made of it all is in
its PTX, see `test_compiled_code_fences_before_wgmma`.

Not checked: global memory written by one thread and read by another, and accumulators touched while a wgmma is under
way, which ptxas answers with "serialized".
"""

from __future__ import annotations

import builtins
import operator
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.language import constexpr

DTYPES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp32",
    torch.int32: "int32",
    torch.int64: "int64",
}
FLOATS = ("bf16", "fp32")
RANKS = ("int1", "int32", "int64", "bf16", "fp32")
NEVER = -1


class EmulationError(AssertionError):
    """The kernel does what it must not."""


@dataclass(frozen=True)
class Half:
    """A tensor whose elements the kernel takes for bfloat16, whatever they are here."""

    tensor: Tensor


class Tile:
    """A tensor in registers, or a scalar (no layout)."""

    def __init__(self, data: Tensor, dtype: str, layout: Any = None):
        rank = 0 if layout is None else layout.rank
        if data.ndim != rank:
            raise EmulationError(f"a tensor of {data.ndim} dimensions has the layout {layout}")
        self.data, self.dtype, self.layout = data, dtype, layout

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    def to(self, dtype: str) -> Tile:
        if dtype == self.dtype:
            return self
        data = self.data
        if dtype in FLOATS:
            data = data.to(_now().number)
            if dtype == "bf16" and _now().rounds:
                data = data.bfloat16().to(_now().number)
        elif self.dtype in FLOATS:
            data = data.trunc().long()
        return Tile(data, dtype, self.layout)

    def __getitem__(self, index: Any) -> Tile:
        axis = index.index(None)
        if index not in ((None, slice(None)), (slice(None), None)):
            raise EmulationError(f"no such index: {index}")
        if not isinstance(self.layout, gl.SliceLayout) or self.layout.dim != axis:
            raise EmulationError(f"axis {axis} cannot be added to the layout {self.layout}")
        return Tile(self.data.unsqueeze(axis), self.dtype, self.layout.parent)

    def __bool__(self) -> bool:
        if self.layout is not None:
            raise EmulationError("a branch depends on a tensor")
        return bool(self.data)

    def __neg__(self) -> Tile:
        return Tile(-self.data, self.dtype, self.layout)


def _tile(x: Any, like: Tile | None = None) -> Tile:
    if isinstance(x, Tile):
        return x
    if isinstance(x, Pending):
        raise EmulationError("a product is used before it was waited for")
    if isinstance(x, bool):
        return Tile(torch.tensor(x), "int1")
    if isinstance(x, int):
        integer = like.dtype if like is not None and like.dtype in ("int32", "int64") else "int32"
        return Tile(torch.tensor(x), integer)
    if isinstance(x, float):
        return Tile(torch.tensor(x, dtype=_now().number), "fp32")
    raise EmulationError(f"{type(x).__name__} is no value of a kernel")


def _elementwise(function: Callable[..., Tensor], *operands: Any, dtype: str | None = None) -> Tile:
    """The function of tiles in one layout, in the widest of their dtypes unless the result has another one."""
    known = next((x for x in operands if isinstance(x, Tile)), None)
    tiles = [_tile(x, known) for x in operands]
    layouts = [x.layout for x in tiles if x.layout is not None]
    if any(x != layouts[0] for x in layouts):
        raise EmulationError(f"layouts meet that differ: {layouts}")
    widest = builtins.max((x.dtype for x in tiles), key=RANKS.index)
    result = function(*(x.to(widest).data for x in tiles))
    return Tile(result, dtype or widest, layouts[0] if layouts else None)


def _operator(function: Callable[..., Tensor], compares: bool = False) -> tuple[Any, Any]:
    dtype = "int1" if compares else None
    return (
        lambda self, other: _elementwise(function, self, other, dtype=dtype),
        lambda self, other: _elementwise(function, other, self, dtype=dtype),
    )


def _quotient(x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x, y, rounding_mode="trunc")


for _name, _function in (
    ("add", operator.add), ("sub", operator.sub), ("mul", operator.mul), ("truediv", operator.truediv),
    ("floordiv", _quotient), ("mod", torch.fmod), ("and", operator.and_), ("rshift", operator.rshift),
):  # fmt: skip
    _forward, _reflected = _operator(_function)
    setattr(Tile, f"__{_name}__", _forward)
    setattr(Tile, f"__r{_name}__", _reflected)
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Tile, f"__{_name}__", _operator(getattr(operator, _name), compares=True)[0])


class Pointer:
    """Addresses of elements of a tensor."""

    def __init__(self, memory: Tensor, dtype: str, offsets: Tile):
        self.memory, self.dtype, self.offsets = memory, dtype, offsets

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.dtype, self.offsets + other)

    def valid(self, mask: Any) -> Tensor:
        """Where the mask allows an access; all those are inside."""
        allowed = (
            torch.tensor(True) if mask is None else _elementwise(lambda _, m: m, self.offsets, mask, dtype="int1").data
        )
        allowed = allowed.bool().broadcast_to(self.offsets.shape)
        at = self.offsets.data[allowed]
        if at.numel() and (at.min() < 0 or at.max() >= self.memory.numel()):
            raise EmulationError(
                f"an address is outside of a tensor of {self.memory.numel()}: {at.min()} to {at.max()}"
            )
        return allowed


class Pending:
    """A wgmma that was begun: what it will give, and what it reads until it was waited for."""

    def __init__(self, result: Tile, reads: list[Shared]):
        self.result, self.reads, self.done = result, reads, False


@dataclass
class History:
    """Of each element of an allocation: when it was last written, read by ld, when a wgmma that read it began, and when
    one was waited for; how many read it now; whether cp.async writes it.
    """

    written: Tensor
    read: Tensor
    multiplied: Tensor
    released: Tensor
    readers: Tensor
    arriving: Tensor

    def viewed(self, view: Callable[[Tensor], Tensor]) -> History:
        return History(*(view(x) for x in vars(self).values()))


class Shared:
    """A descriptor of shared memory: a view of an allocation and of its history."""

    def __init__(self, data: Tensor, dtype: str, history: History):
        self.data, self.dtype, self.history = data, dtype, history

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    def _viewed(self, view: Callable[[Tensor], Tensor]) -> Shared:
        return Shared(view(self.data), self.dtype, self.history.viewed(view))

    def index(self, i: Any) -> Shared:
        at = int(_tile(i).data)
        if not 0 <= at < self.shape[0]:
            raise EmulationError(f"index {at} of {self.shape[0]} buffers")
        return self._viewed(lambda x: x[at])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        if start + length > self.shape[dim]:
            raise EmulationError(f"a slice to {start + length} of {self.shape[dim]}")
        return self._viewed(lambda x: x.narrow(dim, start, length))

    def permute(self, order: Sequence[int]) -> Shared:
        return self._viewed(lambda x: x.permute(*order))

    def load(self, layout: Any) -> Tile:
        now, history = _now(), self.history
        self._arrived("read")
        if bool((history.written > now.barrier).any()):
            now.synchronize()
        history.read.fill_(now.tick())
        return Tile(self.data.clone(), self.dtype, layout)

    def store(self, value: Tile) -> None:
        value = _tile(value)
        if value.shape != self.shape or value.dtype != self.dtype:
            raise EmulationError(f"{value.dtype} {tuple(value.shape)} is stored into {self.dtype} {tuple(self.shape)}")
        self._overwrite(value.data)

    def _overwrite(self, data: Tensor) -> None:
        now, history = _now(), self.history
        if bool(history.arriving.any()):
            raise EmulationError("written while cp.async writes there")
        if any(bool((x > now.barrier).any()) for x in (history.written, history.read, history.multiplied)):
            now.synchronize()
        if bool((history.readers > 0).any()):
            raise EmulationError("written while a wgmma reads there: it was not waited for")
        if bool((history.released > now.barrier).any()):
            raise EmulationError(
                "written while a wgmma of other warps may read there: no barrier since it was waited for"
            )
        self.data.copy_(data)
        history.written.fill_(now.tick())
        for x in (history.read, history.multiplied, history.released):
            x.fill_(NEVER)

    def copy(self, data: Tensor) -> None:
        """By cp.async."""
        self._overwrite(data)
        self.history.arriving.fill_(True)

    def multiply(self) -> None:
        """wgmma reads from here on."""
        now, history = _now(), self.history
        self._arrived("read by wgmma")
        latest = int(history.written.max())
        fence = next((x for x in now.fences if x > latest), None)
        if fence is None:
            raise EmulationError("wgmma reads what was written with no fence_async_shared since")
        if fence > now.barrier:
            raise EmulationError(
                "wgmma reads what other warps may not have fenced: no barrier since fence_async_shared"
            )
        history.multiplied.fill_(now.tick())
        history.readers.add_(1)

    def release(self) -> None:
        """wgmma has read."""
        self.history.released.fill_(_now().tick())
        self.history.readers.sub_(1)

    def _arrived(self, what: str) -> None:
        if bool((self.history.written == NEVER).any()):
            raise EmulationError(f"{what} before it was written")
        if bool(self.history.arriving.any()):
            raise EmulationError(f"{what} before cp.async was waited for")


class Emulator:
    """A GPU of one block at a time. number: the dtype of floats; rounds: whether bfloat16 is."""

    def __init__(self, number: torch.dtype = torch.float32, rounds: bool = True):
        self.number, self.rounds = number, rounds
        self.functions: dict[Any, Callable[..., Any]] = {}
        self.language = _language()

    def launch(self, kernel: Any, programs: int, arguments: dict[str, Any], num_warps: int) -> None:
        """Runs a `@gluon.jit` kernel; tensors are written in place. A tensor wrapped in `Half` is of bfloat16."""
        global _current
        given = {name: self._pointer(x) for name, x in arguments.items()}
        self.num_warps = num_warps
        outer, _current = _current, self
        try:
            for self.program in range(programs):
                self.time, self.barrier, self.barriers = 0, NEVER, 0
                self.fences: list[int] = []
                self.products: list[Pending] = []
                self.copies: list[list[Shared]] = [[]]
                self.translated(kernel)(**given)
                if any(self.copies) or any(not x.done for x in self.products):
                    raise EmulationError("the kernel ends before its asynchronous copies and products")
        finally:
            _current = outer

    def _pointer(self, x: Any) -> Any:
        if isinstance(x, Half):
            return Pointer(x.tensor.view(-1), "bf16", Tile(torch.tensor(0), "int64"))
        if isinstance(x, Tensor):
            return Pointer(x.view(-1), DTYPES[x.dtype], Tile(torch.tensor(0), "int64"))
        return x

    def translated(self, function: Any) -> Callable[..., Any]:
        """The Python function of a jit function, with the language's names meaning what they do here."""
        python = function.fn
        if python not in self.functions:
            names: dict[str, Any] = {}
            made = types.FunctionType(python.__code__, names, python.__name__, python.__defaults__)
            made.__kwdefaults__ = python.__kwdefaults__
            self.functions[python] = made
            for name in python.__code__.co_names:
                if name in python.__globals__:
                    names[name] = self._translated_name(name, python.__globals__[name])
        return self.functions[python]

    def _translated_name(self, name: str, value: Any) -> Any:
        if isinstance(value, constexpr):
            return value.value
        if isinstance(value, types.ModuleType):
            return self.language
        known = getattr(self.language, getattr(value, "__name__", name), None)
        if known is not None:
            return known
        if hasattr(value, "fn"):
            return self.translated(value)
        return value

    def tick(self) -> int:
        self.time += 1
        return self.time

    def synchronize(self) -> None:
        self.barrier = self.tick()
        self.barriers += 1

    def fence(self) -> None:
        self.fences.append(self.tick())


_current: Emulator | None = None


def _now() -> Emulator:
    assert _current is not None, "only inside of Emulator.launch"
    return _current


def _load(pointer: Pointer, mask: Any = None, other: Any = 0.0) -> Tile:
    allowed = pointer.valid(mask)
    data = pointer.memory[torch.where(allowed, pointer.offsets.data, 0)]
    is_float = pointer.dtype in FLOATS
    data = data.to(_now().number) if is_float else data.long()
    elsewhere = torch.as_tensor(other if not isinstance(other, Tile) else other.data, dtype=data.dtype)
    return Tile(torch.where(allowed, data, elsewhere), pointer.dtype, pointer.offsets.layout)


def _store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    allowed = pointer.valid(mask)
    data = _elementwise(lambda _, x: x, pointer.offsets, value, dtype=_tile(value).dtype).to(pointer.dtype).data
    pointer.memory[pointer.offsets.data[allowed]] = data.broadcast_to(allowed.shape)[allowed].to(pointer.memory.dtype)


def _warps(layout: Any, axis: int) -> int:
    """Over how many warps an axis is spread."""
    if isinstance(layout, gl.SliceLayout):
        return _warps(layout.parent, axis + (axis >= layout.dim))
    return layout.warps_per_cta[axis]


def _reduced(x: Tile, axis: int, function: Callable[..., Tensor]) -> Tile:
    layout = gl.SliceLayout(axis, x.layout) if x.layout.rank > 1 else None
    return Tile(function(x.data, axis), x.dtype, layout)


def _reduce(x: Any, axis: int, combine: Any = None, function: Callable[..., Tensor] = torch.sum) -> Any:
    """`combine`, if there is one, has to add."""
    tiles = x if isinstance(x, tuple) else (x,)
    if combine is not None:
        digits = [Tile(torch.tensor(10**i), "int64") for i in range(2 * len(tiles))]
        sums = [int(y.data) for y in combine(*digits)]
        if sums != [10**i + 10 ** (i + len(tiles)) for i in range(len(tiles))]:
            raise EmulationError("the emulator has reductions by tuples only as sums")
    if any(_warps(y.layout, axis) > 1 for y in tiles):
        _now().synchronize()  # the warps' results go through shared memory of their own
    results = tuple(_reduced(y, axis, function) for y in tiles)
    return results if isinstance(x, tuple) else results[0]


def _inline_asm_elementwise(asm: str, constraints: str, operands: Sequence[Tile], dtype: str, **_: Any) -> Tile:
    (x,) = operands
    width = {"int32": ("b32", "=r,r"), "int64": ("b64", "=l,l")}[dtype]
    if (asm, constraints) != (f"mov.{width[0]} $0, $1;", width[1]) or x.dtype != dtype:
        raise EmulationError(f"the emulator knows only moves, not {asm!r} of {x.dtype}")
    return x


def _allocate(dtype: str, shape: Sequence[int], layout: Any) -> Shared:
    if {"bf16": 16, "fp32": 32}[dtype] != layout.element_bitwidth or layout.swizzle_byte_width != 128:
        raise EmulationError(f"{dtype} in shared memory with {layout}: the emulator has only 128 byte swizzle")
    never = [torch.full(tuple(shape), NEVER) for _ in range(4)]
    data = torch.full(tuple(shape), float("nan"), dtype=_now().number)
    nobody = torch.zeros(tuple(shape), dtype=torch.int64)
    return Shared(data, dtype, History(*never, nobody, nobody.bool()))


def _warpgroup_mma(a: Any, b: Any, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
    if not isinstance(a, Shared) or not isinstance(b, Shared):
        raise EmulationError("the emulator has operands of wgmma only in shared memory")
    acc = _tile(acc)
    (m, k), (k_too, n), layout = a.shape, b.shape, acc.layout
    if (m, n) != tuple(acc.shape) or k != k_too or k % 16:
        raise EmulationError(f"{tuple(a.shape)} times {tuple(b.shape)} is added to {tuple(acc.shape)}")
    if not isinstance(layout, gl.NVMMADistributedLayout) or list(layout.version) != [3, 0]:
        raise EmulationError(f"the accumulator is in the layout {layout}")
    warps, (rows, columns, depth) = layout.warps_per_cta, layout.instr_shape
    if (
        warps[0] % 4
        or rows != 16
        or depth != 16
        or columns % 8
        or columns > 256
        or warps[0] * warps[1] != _now().num_warps
    ):
        raise EmulationError(f"wgmma has no such form: {layout}")
    if m % (rows * warps[0]) or n % (columns * warps[1]):
        raise EmulationError(f"{m} rows and {n} columns are computed more than once in the layout {layout}")
    if acc.dtype != "fp32" or a.dtype != "bf16" or b.dtype != "bf16":
        raise EmulationError(f"{a.dtype} times {b.dtype} is added to {acc.dtype}")
    if any(bool((x.history.written > _now().barrier).any()) for x in (a, b)):
        _now().synchronize()
    a.multiply()
    b.multiply()
    product = a.data @ b.data
    pending = Pending(Tile(acc.data + product if use_acc else product, "fp32", layout), [a, b])
    _now().products.append(pending)
    return pending if is_async else _warpgroup_mma_wait(0, [pending])


def _warpgroup_mma_wait(num_outstanding: int = 0, deps: Sequence[Any] = ()) -> Any:
    products = _now().products
    for product in products[: len(products) - num_outstanding]:
        if not product.done:
            product.done = True
            for x in product.reads:
                x.release()
    if not all(isinstance(x, Pending) and x.done for x in deps):
        raise EmulationError(f"{num_outstanding} products may be outstanding, and one of the results is of those")
    for product in products[: len(products) - num_outstanding]:
        product.reads = []
    results = [x.result for x in deps]
    return results[0] if len(results) == 1 else tuple(results)


def _copy_global_to_shared(shared: Shared, pointer: Pointer, mask: Any = None) -> None:
    if shared.shape != pointer.offsets.shape or shared.dtype != pointer.dtype:
        raise EmulationError(f"{tuple(pointer.offsets.shape)} is copied to {tuple(shared.shape)}")
    shared.copy(_load(pointer, mask, 0.0).data)
    _now().copies[-1].append(shared)


def _commit_group() -> None:
    _now().copies.append([])


def _wait_group(num_outstanding: int = 0) -> None:
    now = _now()
    *groups, unfinished = now.copies
    for group in groups[: len(groups) - num_outstanding]:
        for x in group:
            x.history.arriving.fill_(False)
            x.history.written.fill_(now.tick())
    now.copies = [*groups[len(groups) - num_outstanding :], unfinished]
    now.synchronize()


def _full(shape: Sequence[int], value: float, dtype: str, layout: Any) -> Tile:
    return Tile(torch.full(tuple(shape), value, dtype=_now().number), dtype, layout)


def _static_assert(condition: bool) -> None:
    if not condition:
        raise EmulationError("a static assertion fails")


def _language() -> types.SimpleNamespace:
    """What kernels name of `triton.language`, `triton.experimental.gluon.language` and its modules."""
    return types.SimpleNamespace(
        **{name: getattr(gl, name) for name in dir(gl) if name.endswith("Layout")},
        int1="int1", int32="int32", int64="int64", bfloat16="bf16", float32="fp32",
        static_range=range, static_assert=_static_assert, num_warps=lambda: _now().num_warps,
        program_id=lambda axis: Tile(torch.tensor(_now().program), "int32"),
        arange=lambda start, end, layout: Tile(torch.arange(start, end), "int32", layout),
        zeros=lambda shape, dtype, layout: _full(shape, 0.0, dtype, layout), full=_full,
        load=_load, store=_store, reduce=_reduce, sum=_reduce, inline_asm_elementwise=_inline_asm_elementwise,
        max=lambda x, axis: _reduce(x, axis, function=torch.amax),
        where=lambda c, x, y: _elementwise(lambda c, x, y: torch.where(c.bool(), x, y), c, x, y),
        exp=lambda x: _elementwise(torch.exp, x), abs=lambda x: _elementwise(torch.abs, x),
        sqrt=lambda x: _elementwise(torch.sqrt, x), rsqrt=lambda x: _elementwise(torch.rsqrt, x),
        maximum=lambda x, y: _elementwise(torch.maximum, x, y), minimum=lambda x, y: _elementwise(torch.minimum, x, y),
        allocate_shared_memory=_allocate, barrier=lambda: _now().synchronize(),
        debug_barrier=lambda: _now().synchronize(),
        fence_async_shared=lambda: _now().fence(),
        warpgroup_mma=_warpgroup_mma, warpgroup_mma_wait=_warpgroup_mma_wait,
        async_copy_global_to_shared=_copy_global_to_shared, commit_group=_commit_group, wait_group=_wait_group,
    )  # fmt: skip
