"""The copy of a state in host memory, which a save writes from while training changes the state itself.

Only what this rank writes is copied. The buffers stay for the next save, so that nothing is allocated in the time that
training waits; beside a GPU they are page-locked, and all copies are on their way together.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch

import titans_dist.megatron  # noqa: F401  # isort: skip  (quickens the imports below)
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import _replace_state_dict_keys_with_sharded_keys

from titans_dist.checkpoint.common import encode_common
from titans_dist.config.errors import CheckpointError

_REGISTERED_BYTES = 1 << 20
"""Larger buffers are page-locked as they are. torch's allocator of page-locked memory, good for smaller ones, rounds up
to a power of two, which would cost up to twice the shard."""


@dataclasses.dataclass(frozen=True)
class HostCopy:
    """This rank's part of a state, as it was."""

    tensors: dict[str, list[ShardedTensor]]
    """By key; those that this rank writes, in host memory."""
    layout: list[ShardedTensor]
    """All that this rank has, without their data."""
    common: str
    """Unsharded values as JSON, on rank 0."""
    numbers: dict[str, list[float]]
    """Of the unsharded values those named `lr` and `step`, wherever they are; on rank 0."""


class HostBuffers:
    """Memory that is used by one `HostCopy` after the other."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self._registered: list[torch.Tensor] = []

    def copy(self, sharded_state: dict[str, Any], is_rank_0: bool, private: tuple[str, ...] = ()) -> HostCopy:
        """Copy a state; the last copy is not valid any more. Returns when the state may change.

        Tensors in host memory whose keys begin with one of `private` are copies already, and are taken as they are.
        """
        sharded, common = save_preprocess(without_objects(sharded_state), False)
        owned, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
        tensors = {key: [self._copy(part, private) for part in parts] for key, parts in owned.items()}
        # Written while the copies are on their way.
        text = encode_common(common) if is_rank_0 else ""
        numbers = {name: _numbers(common, name) for name in ("lr", "step")} if is_rank_0 else {}
        layout = [part.without_data() for part in nested_values(sharded)]
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return HostCopy(tensors, layout, text, numbers)

    def release(self) -> None:
        """Give the memory back."""
        for buffer in self._registered:
            torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
        self._registered.clear()
        self._buffers.clear()

    def _copy(self, part: ShardedTensor, private: tuple[str, ...]) -> ShardedTensor:
        data = part.data.detach()
        if data.is_cpu and part.key.startswith(private):
            return part
        place = part.key, tuple(part.global_offset)
        buffer = self._buffers.get(place)
        if buffer is None or buffer.shape != data.shape or buffer.dtype != data.dtype:
            buffer = self._buffers[place] = self._allocated(data)
        buffer.copy_(data, non_blocking=True)
        return dataclasses.replace(part, data=buffer)

    def _allocated(self, like: torch.Tensor) -> torch.Tensor:
        if not like.is_cuda or like.nbytes < _REGISTERED_BYTES:
            return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda)
        buffer = torch.empty(like.shape, dtype=like.dtype, device="cpu")
        # The buffer stays pageable where the system allows no more locked memory: slower, but right.
        if int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)) == 0:
            self._registered.append(buffer)
        return buffer


def without_objects(sharded_state: dict[str, Any]) -> dict[str, Any]:
    """A copy in which empty ShardedObjects (the ``_extra_state`` of megatron-core's linears) are not stored.

    Raises CheckpointError for one that is not empty.
    """
    copy, _ = extract_matching_values(sharded_state, lambda _: True)

    def replace(value: Any) -> Any:
        if not isinstance(value, ShardedObject):
            return value
        if value.data is not None:
            raise CheckpointError(f"{value.key} would be stored as a pickle; make it a ShardedTensor or plain numbers")
        return LocalNonpersistentObject(None)

    copied: dict[str, Any] = dict_list_map_inplace(replace, copy)
    return copied


def frozen_json(meta: dict[str, Any]) -> dict[str, Any]:
    """A copy of JSON that later changes of `meta` do not reach; raises ValueError or TypeError where it is none."""
    copy: dict[str, Any] = json.loads(json.dumps(meta, allow_nan=False))
    return copy


def _numbers(state: Any, name: str) -> list[float]:
    """Every number called `name` in nested dicts and lists."""
    if isinstance(state, dict):
        own = [float(state[name])] if isinstance(state.get(name), int | float | torch.Tensor) else []
        return own + [number for value in state.values() for number in _numbers(value, name)]
    if isinstance(state, list | tuple):
        return [number for value in state for number in _numbers(value, name)]
    return []
