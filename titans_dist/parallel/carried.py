"""The state that this rank's lanes of the stream carry from one step to the next."""

from __future__ import annotations

import re
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from titans_dist.config import Config
from titans_dist.layers.state import map_tensors
from titans_dist.model import LanguageModel, ModelState, flatten, unflatten


class CarriedState:
    """One state per micro-batch of this rank, cut off from what made it: the border of truncated backpropagation.

    In a checkpoint every tensor is whole, (global_batch, ...): data-parallel ranks and their micro-batches hold parts
    of the lanes, tensor-parallel ranks parts of the heads. So any layout can go on from it.
    """

    def __init__(self, config: Config, model: LanguageModel) -> None:
        training = config.training
        self._count = training.global_batch_size // training.micro_batch_size // _data_size()
        with torch.no_grad():
            begin = model.initial_state(training.micro_batch_size)
        # Nobody reads this: the first tokens of a run start documents.
        self._states = [_copied(begin) for _ in range(self._count)]
        with torch.device("meta"), torch.no_grad():
            one = LanguageModel(config.model).to("meta")  # .to: some buffers are made elsewhere
            for i, block in enumerate(model.blocks):
                one.blocks[i] = block and one.blocks[i]
            whole = one.initial_state(1)
        parts, wholes = flatten(begin), flatten(whole)
        self._axes = {name: _split_axis(parts[name], wholes[name]) for name in parts}

    def __getitem__(self, number: int) -> ModelState:
        """The state that micro-batch `number` begins with."""
        return self._states[number]

    def __setitem__(self, number: int, state: ModelState) -> None:
        self._states[number] = _copied(state)

    def kept(self) -> list[ModelState]:
        """The states as they are now, for `restore`."""
        return list(self._states)

    def restore(self, kept: list[ModelState]) -> None:
        """Begin again where `kept` was taken: the step in between is not made, or only looked at."""
        self._states = list(kept)

    def positions(self) -> dict[str, int]:
        """Numbers of the state that are no tensors of the lanes: the same in all lanes, and in all layers."""
        return {_in_any_layer(name): int(value) for name, value in flatten(self[0]).items() if value.dim() == 0}

    def sharded_state(self) -> dict[str, dict[str, ShardedTensor]]:
        """This rank's part of the tensors of a sharded checkpoint, by micro-batch."""
        return {
            str(number): {
                name: self._sharded(name, value, number) for name, value in flatten(state).items() if value.dim() > 0
            }
            for number, state in enumerate(self._states)
        }

    def load(self, loaded: dict[str, dict[str, Tensor]], positions: dict[str, int]) -> None:
        """Take over a loaded `sharded_state` with its `positions`."""
        for number, state in enumerate(self._states):
            names = [name for name, value in flatten(state).items() if value.dim() == 0]
            numbers = {name: torch.tensor(positions[_in_any_layer(name)]) for name in names}
            self[number] = unflatten({**loaded[str(number)], **numbers}, state)

    def _sharded(self, name: str, value: Tensor, number: int) -> ShardedTensor:
        tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        first = parallel_state.get_data_parallel_rank() * self._count + number
        offsets, axis = [(0, first, self._count * _data_size())], self._axes[name]
        if axis is not None:
            offsets.append((axis, tensor_rank, parallel_state.get_tensor_model_parallel_world_size()))
        replica = tensor_rank if axis is None else 0
        return ShardedTensor.from_rank_offsets(f"carried.{name}", value, *offsets, replica_id=replica)


def carried_sharded_state(parts: list[CarriedState]) -> dict[str, Any]:
    """What the parts of the model that this rank has carry, for a sharded checkpoint that fits any layout."""
    sharded = {str(number): part.sharded_state() for number, part in enumerate(parts)}
    return {"positions": parts[0].positions(), "parts": sharded}


def load_carried(parts: list[CarriedState], loaded: dict[str, Any]) -> None:
    """Take over a loaded `carried_sharded_state`."""
    for number, part in enumerate(parts):
        part.load(loaded["parts"][str(number)], loaded["positions"])


def _in_any_layer(name: str) -> str:
    """A name of the first stage's checkpoint, which is the one whose numbers are kept, for that of any layer."""
    return re.sub(r"^layers\.\d+\.", "", name)


def _data_size() -> int:
    return parallel_state.get_data_parallel_world_size()


def _copied(state: ModelState) -> ModelState:
    """Copies, because a cache may be a view of all the keys of the step that made it."""
    return map_tensors(state, lambda x: x.detach().clone(memory_format=torch.contiguous_format))


def _split_axis(part: Tensor, whole: Tensor) -> int | None:
    """The dimension after the batch that a rank has a part of, found by its size; None where it has all."""
    sizes = zip(part.shape[1:], whole.shape[1:], strict=True)
    return next((axis for axis, (here, all_) in enumerate(sizes, 1) if here != all_), None)
