"""States as data: dataclasses of tensors (batch first), integers, and lists or dataclasses of those."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

State = TypeVar("State")


def map_tensors(state: State, change: Callable[[Tensor], Tensor]) -> State:
    """The same state with every tensor changed."""
    done: Any = state
    if isinstance(state, Tensor):
        done = change(state)
    elif isinstance(state, list):
        done = [map_tensors(item, change) for item in state]
    elif dataclasses.is_dataclass(state) and not isinstance(state, type):
        changed = {f.name: map_tensors(getattr(state, f.name), change) for f in dataclasses.fields(state)}
        done = dataclasses.replace(state, **changed)
    return done


def expand(state: State, batch: int) -> State:
    """The state of one sequence (B = 1) as that of `batch` equal ones, without a copy."""
    return map_tensors(state, lambda x: x.expand(batch, *x.shape[1:]))
