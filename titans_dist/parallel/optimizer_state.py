"""The state of megatron-core's optimizers in a checkpoint that fits any layout of ranks.

megatron-core 0.16.1 assumes Transformer Engine's or Apex's Adam. With ``torch.optim.Adam(W)``, which it takes without
them (on GPU machines too), the first four of these things break; the fifth always does. Each has its mend here:

1. ``DistributedOptimizer.state_dict`` fails before the first step and on a rank whose shard is empty, because it looks
   for one common ``step`` in the state of the parameters. The state is made in advance, as the first step would make
   it, and an empty shard gets a stand-in while the state is collected.
2. Loading ``fully_reshardable`` state raises ``KeyError: 'step'``: the moments are copied together with a ``step`` that
   the format does not have.
3. After a load all parameters share one ``step`` tensor, which Adam then increments once per parameter.
4. The plain optimizers save no ``step`` when it is 0, and Adam misses it at the next step.
5. Where gradients are in more than one bucket and a bucket is padded, ``fully_reshardable`` cuts the parameters of all
   later buckets out of the wrong places: it looks where they are with the padding, in a tensor without. Nothing says
   so; the values of a load are wrong. In a pipeline tied embeddings have a bucket of their own: all of those are hit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from titans_dist.parallel.cpu import cpu_device_mode

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
_STAND_IN = "stand-in for an empty shard"


def optimizer_sharded_state(
    optimizer: MegatronOptimizer, model_sharded_state: dict[str, Any], is_loading: bool
) -> dict[str, Any]:
    """The optimizer's state as ShardedTensors keyed like those of the model; collective over the data-parallel group.

    ``model_sharded_state`` is the result of the model's ``sharded_state_dict()`` at the same moment. With
    ``is_loading`` the tensors are places to read into, and the moments need not exist yet.
    """
    with contextlib.ExitStack() as stack:
        for part in _parts(optimizer):
            _make_missing_state(part)
            stack.enter_context(_stand_in_for_empty_shard(part))
            if isinstance(part, DistributedOptimizer):
                stack.enter_context(_places_without_padding(part))
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
            _make_missing_state(part)
            if isinstance(part, DistributedOptimizer):
                stack.enter_context(_keeping_step(part))
        stack.enter_context(cpu_device_mode())
        optimizer.load_state_dict(loaded)
    for part in _parts(optimizer):
        _unshare_steps(part)


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers behind a ChainedOptimizer that have parameters and a torch Adam inside."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW)]


def _make_missing_state(part: Any) -> None:
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
def _keeping_step(part: DistributedOptimizer) -> Iterator[None]:
    """Mend 2: the step, which ``load_state_dict`` has set already, is "copied" onto itself."""
    original = part._set_main_param_and_optimizer_states

    def set_states(model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = part.model_param_group_index_map[model_param]
        state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
        original(model_param, {**tensors, "step": state["step"]})

    part._set_main_param_and_optimizer_states = set_states
    try:
        yield
    finally:
        del part._set_main_param_and_optimizer_states  # the instance's; the method of the class is back


@contextlib.contextmanager
def _places_without_padding(part: DistributedOptimizer) -> Iterator[None]:
    """Mend 5: for the moment, each parameter's place is that in the buffer whose padding between buckets is gone."""
    originals = [buffer.param_index_map for buffer in part.buffers]
    for buffer in part.buffers:
        padding, unpadded = [], 0
        for (first, _), bucket in zip(buffer.bucket_indices, buffer.buckets, strict=True):
            padding.append(first - unpadded)
            unpadded += bucket.numel_unpadded
        buffer.param_index_map = {
            parameter: (start - padding[bucket], end - padding[bucket], bucket)
            for parameter, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, original in zip(part.buffers, originals, strict=True):
            buffer.param_index_map = original


def _store_step_0(state: dict[str, Any]) -> None:
    """Mend 4: ``FP32Optimizer`` has the torch state at the top, ``Float16Optimizer...`` below "optimizer"."""
    moments = state.get("optimizer", state)["state"]
    moments.setdefault("common_step", torch.tensor(0.0))


def _unshare_steps(part: Any) -> None:
    """Mend 3."""
    for group in part.optimizer.param_groups:
        for parameter in group["params"]:
            state = part.optimizer.state[parameter]
            state["step"] = state["step"].clone()
