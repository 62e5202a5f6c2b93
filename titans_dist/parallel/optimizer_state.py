"""The state of megatron-core's optimizers in a checkpoint that fits any layout of ranks.

Of a ``DistributedOptimizer`` each data-parallel rank updates a range of some flattened parameters. It gives the state
of just these ranges, as boxes of the parameters' own shape, under the keys and shapes of upstream's
``fully_reshardable`` format. Upstream gathers the whole state on every data-parallel rank instead, in memory several
times as large as what is saved, lets the first rank write all of it, and cuts it in the wrong places where gradients
are in more than one bucket and one is padded (in a pipeline tied embeddings have a bucket of their own).

megatron-core 0.16.1 also assumes Transformer Engine's or Apex's Adam. With ``torch.optim.Adam(W)``, which it takes
without them (on GPU machines too), three things break. Each has its mend here:

1. ``DistributedOptimizer.state_dict`` fails before the first step and on a rank whose shard is empty, because it looks
   for one common ``step`` in the state of the parameters. The state is made in advance, as the first step would make
   it, and an empty shard gets a stand-in while the state is collected.
2. After a load all parameters share one ``step`` tensor, which Adam then increments once per parameter.
3. The plain optimizers save no ``step`` when it is 0, and Adam misses it at the next step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from titans_dist.parallel.cpu import cpu_device_mode

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
_STAND_IN = "stand-in for an empty shard"


def optimizer_sharded_state(
    optimizer: MegatronOptimizer, model_sharded_state: dict[str, Any], is_loading: bool
) -> dict[str, Any]:
    """The optimizer's state as ShardedTensors keyed like those of the model.

    ``model_sharded_state`` is the result of the model's ``sharded_state_dict()`` at the same moment. The tensors are
    the optimizer's own, not copies: the next step changes them. With ``is_loading`` they are places to read into, and
    the moments need not exist yet.
    """
    with contextlib.ExitStack() as stack:
        for part in _parts(optimizer):
            make_missing_state(part)
            stack.enter_context(_stand_in_for_empty_shard(part))
            if isinstance(part, DistributedOptimizer):
                stack.enter_context(_own_ranges(part))
        stack.enter_context(cpu_device_mode())
        state: dict[str, Any] = optimizer.sharded_state_dict(
            model_sharded_state, is_loading=is_loading, metadata=_METADATA
        )
    parts = _parts(optimizer)
    for part in parts:
        _unshare_steps(part)
    if not is_loading:
        for part, part_state in zip(parts, [state] if len(parts) == 1 else state.values(), strict=True):
            if not isinstance(part, DistributedOptimizer):
                _store_step_0(part_state)
    return state


def load_optimizer_state(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Take over what was loaded into ``optimizer_sharded_state(..., is_loading=True)``."""
    with contextlib.ExitStack() as stack:
        for part in _parts(optimizer):
            make_missing_state(part)
            if isinstance(part, DistributedOptimizer):
                stack.enter_context(_own_ranges(part))
        stack.enter_context(cpu_device_mode())
        optimizer.load_state_dict(loaded)
    for part in _parts(optimizer):
        _unshare_steps(part)


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers behind a ChainedOptimizer that have parameters and a torch Adam inside."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW)]


def make_missing_state(part: Any) -> None:
    """Mend 1: bit by bit what ``torch.optim.Adam`` would make in its first step."""
    for group in part.optimizer.param_groups:
        for parameter in group["params"]:
            state = part.optimizer.state[parameter]
            if not state:
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state.setdefault("step", torch.tensor(0.0))


@contextlib.contextmanager
def _stand_in_for_empty_shard(part: Any) -> Iterator[None]:
    """Mend 1: a data-parallel rank without parameters still has a ``step`` to show; nobody stores or reads it."""
    is_empty = isinstance(part, DistributedOptimizer) and not part.optimizer.state
    if is_empty:
        part.optimizer.state[_STAND_IN] = {"step": torch.tensor(0.0)}
    try:
        yield
    finally:
        if is_empty:
            part.optimizer.state.pop(_STAND_IN, None)


@contextlib.contextmanager
def _own_ranges(part: DistributedOptimizer) -> Iterator[None]:
    """For the moment, the state of the parameters is that of the ranges that this rank updates."""

    def give(model_sharded_state: dict[str, Any], *_: Any, metadata: dict[str, Any]) -> dict[str, Any]:
        places = {id(x.data): x for x in nested_values(model_sharded_state) if isinstance(x, ShardedTensor)}
        ranges = {
            index: {
                name: dict(enumerate(_boxes(name, values, start, places[id(parameter)])))
                for name, values in state.items()
            }
            for index, (parameter, start, state) in enumerate(_ranges(part))
        }
        kind = metadata["distrib_optim_sharding_type"]
        return {**part.state_dict(), "param_state": ranges, "param_state_sharding_type": kind}

    def take(loaded: dict[int, Any]) -> None:
        for index, (_, _, state) in enumerate(_ranges(part)):
            for name, values in state.items():
                boxes = loaded[index][name]
                values.copy_(torch.cat([boxes[number].flatten() for number in range(len(boxes))]))

    # The whole method, since upstream's also collects garbage, for which training would wait.
    part.sharded_state_dict = give
    part.load_parameter_state_from_fully_reshardable = take
    try:
        yield
    finally:  # the instance's; the methods of the class are back
        del part.sharded_state_dict, part.load_parameter_state_from_fully_reshardable


def _ranges(part: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, int, dict[str, torch.Tensor]]]:
    """Each parameter of which this rank updates something: from which element on, and the flat state of that."""
    for buffer in part.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    state = part._get_main_param_and_optimizer_states(parameter)
                    flat = {name: values.detach() for name, values in state.items() if name != "step"}
                    yield parameter, ranges["param"].start, flat


def _boxes(name: str, values: torch.Tensor, start: int, place: ShardedTensor) -> list[ShardedTensor]:
    """`values`, which are those of a flat parameter from element `start` on, as parts of the whole parameter."""
    sharded, done = [], 0
    for offset, shape in boxes_of_range(start, start + values.numel(), place.local_shape):
        size = math.prod(shape)
        sharded.append(
            ShardedTensor(
                key=f"optimizer.state.{name}.{place.key}",
                data=values[done : done + size].view(shape),
                dtype=values.dtype,
                local_shape=shape,
                global_shape=place.global_shape,
                global_offset=tuple(first + own for first, own in zip(place.global_offset, offset, strict=True)),
                axis_fragmentations=None,  # no regular grid
                replica_id=(*place.replica_id[:2], 0),  # no other data-parallel rank has it
            )
        )
        done += size
    return sharded


def boxes_of_range(start: int, end: int, shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Elements `start` to `end` of a flattened tensor of `shape` as offset and shape of boxes, in the same order."""
    if not shape:
        return [((), ())]
    boxes, row_size, origin = [], math.prod(shape[1:]), (0,) * (len(shape) - 1)
    while start < end:
        row, first = divmod(start, row_size)
        if whole := 0 if first else (end - start) // row_size:
            boxes.append(((row, *origin), (whole, *shape[1:])))
            start += whole * row_size
        else:
            stop = min(end, (row + 1) * row_size)
            parts = boxes_of_range(first, stop - row * row_size, shape[1:])
            boxes += [((row, *offset), (1, *part)) for offset, part in parts]
            start = stop
    return boxes


def _store_step_0(state: dict[str, Any]) -> None:
    """Mend 3: ``FP32Optimizer`` has the torch state at the top, ``Float16Optimizer...`` below "optimizer"."""
    moments = state.get("optimizer", state)["state"]
    moments.setdefault("common_step", torch.tensor(0.0))


def _unshare_steps(part: Any) -> None:
    """Mend 2."""
    for group in part.optimizer.param_groups:
        for parameter in group["params"]:
            state = part.optimizer.state[parameter]
            state["step"] = state["step"].clone()
