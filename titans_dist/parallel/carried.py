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

    def sharded_state(self) -> dict[str, Any]:
        """This rank's part of a sharded checkpoint. Positions are the same in all lanes, and in all layers."""
        positions = {_in_any_layer(name): int(value) for name, value in flatten(self[0]).items() if value.dim() == 0}
        parts = {
            str(number): {
                name: self._sharded(name, value, number) for name, value in flatten(state).items() if value.dim() > 0
            }
            for number, state in enumerate(self._states)
        }
        return {"positions": positions, "micro_batches": parts}

    def load(self, loaded: dict[str, Any]) -> None:
        """Take over a loaded `sharded_state`."""
        for number, state in enumerate(self._states):
            numbers = {
                name: loaded["positions"][_in_any_layer(name)] for name, x in flatten(state).items() if x.dim() == 0
            }
            positions = {name: torch.tensor(value) for name, value in numbers.items()}
            self[number] = unflatten({**loaded["micro_batches"][str(number)], **positions}, state)

    def _sharded(self, name: str, value: Tensor, number: int) -> ShardedTensor:
        tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        first = parallel_state.get_data_parallel_rank() * self._count + number
        offsets, axis = [(0, first, self._count * _data_size())], self._axes[name]
        if axis is not None:
            offsets.append((axis, tensor_rank, parallel_state.get_tensor_model_parallel_world_size()))
        replica = tensor_rank if axis is None else 0
        return ShardedTensor.from_rank_offsets(f"carried.{name}", value, *offsets, replica_id=replica)


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
