"""A model between two calls, as data: passed and returned, saved and loaded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from titans_dist.config import CheckpointError
from titans_dist.layers.attention import GrowingCache
from titans_dist.layers.state import map_tensors
from titans_dist.memory import MemoryState

if TYPE_CHECKING:
    from titans_dist.model.language_model import LanguageModel


@dataclass
class ModelState:
    """The state of each layer: dataclasses of tensors (batch first) and integers."""

    layers: list[Any]

    @property
    def batch_size(self) -> int:
        """How many sequences."""
        return next(iter(flatten(self).values())).shape[0]

    def detach(self) -> ModelState:
        """The same numbers, cut off from what made them: the border of truncated backpropagation."""
        return map_tensors(self, Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> ModelState:
        """Every tensor moved, as by `Tensor.to`."""
        return map_tensors(self, lambda x: x.to(*args, **kwargs))


def flatten(state: ModelState) -> dict[str, Tensor]:
    """The state as tensors by name, such as "layers.0.memory.tails.1"; integers are tensors without dimensions."""
    found: dict[str, Tensor] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, int):
            found[name] = torch.tensor(value)
        elif isinstance(value, list):
            for i, item in enumerate(value):
                walk(f"{name}.{i}", item)
        elif value is not None:
            for field in dataclasses.fields(value):
                walk(f"{name}.{field.name}".lstrip("."), getattr(value, field.name))

    walk("", state)
    return found


def unflatten(tensors: dict[str, Tensor], like: ModelState) -> ModelState:
    """What `flatten` took apart, for the model and batch of `like`. Raises CheckpointError if it is another's."""
    left = dict(tensors)

    def take(name: str, like: Any, is_growing: bool = False) -> Any:
        if isinstance(like, list):
            return [take(f"{name}.{i}", item) for i, item in enumerate(like)]
        if dataclasses.is_dataclass(like) and not isinstance(like, type):
            if isinstance(like, MemoryState) and f"{name}.anchor.0" in left:  # it is inside a chunk
                like = dataclasses.replace(like, anchor=like.weights, kept=like.weights[0][..., 0, 0])
            is_growing = isinstance(like, GrowingCache)
            values = {f.name: getattr(like, f.name) for f in dataclasses.fields(like)}
            taken = {key: take(f"{name}.{key}".lstrip("."), value, is_growing) for key, value in values.items()}
            return dataclasses.replace(like, **taken)
        if like is None:
            return None
        if name not in left:
            raise CheckpointError(f"the state has no {name}; it is not of this model: make one with initial_state()")
        value = left.pop(name)
        if isinstance(like, int):
            return int(value)
        given, wanted = tuple(value.shape), tuple(like.shape)
        if is_growing and len(given) > 1:
            wanted = (wanted[0], given[1], *wanted[2:])
        if given != wanted:
            raise CheckpointError(
                f"{name} of the state has shape {given}, this model and batch need {wanted}; "
                "use the state of this model, of as many sequences"
            )
        return value.to(like.device, like.dtype)

    state = take("", like)
    if left:
        raise CheckpointError(f"the state has {min(left)}, which this model does not have; use a state of this model")
    return state


def save_state(state: ModelState, path: str | Path) -> None:
    """Write the state as safetensors."""
    save_file({name: x.detach().cpu().contiguous().clone() for name, x in flatten(state).items()}, path)


def load_state(path: str | Path, model: LanguageModel, batch_size: int) -> ModelState:
    """Read what `save_state` wrote, for `model`. Raises CheckpointError if it is not of this model and batch."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is no saved state: {error}") from None
    with torch.no_grad():
        return unflatten(tensors, model.initial_state(batch_size))
