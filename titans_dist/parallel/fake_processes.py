"""One rank of any layout in one process: tensors without numbers, and torch's fake process group for the others."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from titans_dist.config import ParallelConfig
from titans_dist.parallel import cpu
from titans_dist.parallel.processes import drop_groups, make_groups

_aten = torch.ops.aten


class FakeTensors(FakeTensorMode):
    """Tensors without numbers; what is made on the meta device has none anyway, and stays there."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard against it doubles the time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default:
            return True if args[0].dtype is torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func.namespace == "c10d":
            return _collective(func, args)
        filled = _filled(func)
        if filled is not None:
            return kwargs[filled] if filled else args[0]
        device, first = kwargs.get("device"), args[0] if args else None
        is_meta = isinstance(first, Tensor) and not isinstance(first, FakeTensor) and first.is_meta
        if is_meta or (device is not None and torch.device(device).type == "meta"):
            return func(*args, **kwargs)
        return self.dispatch(func, types, args, kwargs)


@functools.cache
def _filled(func: Any) -> str | None:
    """The argument that an operation fills and returns, "" for the first; None where it makes something new.

    Such an operation changes no shapes, so there is nothing to be done: half of all, and quickly passed.
    """
    schema = func._schema
    written = [x for x in schema.arguments if x.alias_info is not None and x.alias_info.is_write]
    returned = schema.returns
    if func.namespace != "aten" or len(written) != 1 or len(returned) != 1 or func.name() in _RESHAPING:
        return None
    if returned[0].alias_info is None or not returned[0].alias_info.is_write:
        return None
    if written[0].name == schema.arguments[0].name:
        return ""
    return written[0].name if written[0].kwarg_only else None


_RESHAPING = ("aten::resize_", "aten::set_.source_Tensor", "aten::transpose_")
_RESULTS = ("tensors", "output_tensors", "output_tensor", "outputs", "output", "output_lists")


def _collective(func: Any, args: tuple[Any, ...]) -> Any:
    """What a communication call returns: the tensors that it fills, and that it is done."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
    filled = next((given[name] for name in _RESULTS if name in given), None)
    results = [FakeWork().boxed() if "Work" in str(one.type) else filled for one in func._schema.returns]
    return results[0] if len(results) == 1 else tuple(results)


@contextmanager
def fake_processes(parallel: ParallelConfig, rank: int, world: int) -> Iterator[None]:
    """The block is rank `rank` of `world`, with megatron-core's groups; every other rank says what this one says."""
    new_group = dist.new_group

    def faked(*args: Any, **kwargs: Any) -> Any:  # those that go by the CPU, too
        return new_group(*args, **{**kwargs, "backend": "fake"})

    def same(objects: list[Any], own: Any, group: Any = None) -> None:
        objects[:] = [own] * len(objects)

    cpu.install()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(dist, "new_group", faked))
        stack.enter_context(mock.patch.object(dist, "all_gather_object", same))
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _apply))
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        stack.callback(dist.destroy_process_group)
        make_groups(parallel)
        stack.callback(drop_groups)
        yield


def _apply(module: nn.Module, change: Any, recurse: bool = True) -> nn.Module:
    """torch's own swaps fake parameters for others, which it cannot do to one that somebody else knows."""
    for child in module.children():
        child._apply(change)
    for value in module._parameters.values():
        if value is not None:
            value.data = change(value.data)
    for name, constant in module._buffers.items():
        if constant is not None:
            module._buffers[name] = change(constant)
    return module
