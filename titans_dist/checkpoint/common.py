"""The unsharded part of a checkpoint (hyperparameters of the optimizer's groups, counters) as exact JSON.

megatron-core would write it with ``torch.save`` and read it back with ``pickle``. Here it is ``common.json``: numbers,
strings, None, lists, tuples, dicts with keys of any such kind, and small tensors. Floats survive bit by bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.base import LoadCommonStrategy

COMMON = "common.json"

_MAX_TENSOR_ELEMENTS = 1024


def encode_common(state: dict[Any, Any]) -> str:
    """The content of ``common.json`` for ``state``.

    Raises TypeError with the place and type of a value that is none of the above (or a tensor of over 1024 elements).
    """
    return json.dumps(_encode(state, ""))


def write_common(folder: Path, state: dict[Any, Any]) -> None:
    """Write ``state`` to ``common.json``; raises as ``encode_common`` does."""
    (folder / COMMON).write_text(encode_common(state), encoding="utf-8")


def read_common(folder: Path) -> dict[Any, Any]:
    """What ``common.json`` was encoded from. Raises OSError or ValueError where the file is gone or damaged."""
    state: dict[Any, Any] = _decode(json.loads((folder / COMMON).read_text(encoding="utf-8")))
    return state


class JsonCommon(LoadCommonStrategy):
    """Gives ``dist_checkpointing.load`` the state that was read from ``common.json``; no ``common.pt`` is unpickled."""

    def __init__(self, state: dict[Any, Any]) -> None:
        self._state = state

    def load_common(self, checkpoint_dir: str | Path) -> dict[Any, Any]:
        return self._state

    def load_sharded_objects(self, sharded_objects_state_dict: Any, checkpoint_dir: str | Path) -> Any:
        raise NotImplementedError("sharded objects are pickles, and no checkpoint here has any")

    def check_backend_compatibility(self, loaded_backend: str) -> None:
        """The folder's manifest has vouched for the format."""

    def check_version_compatibility(self, loaded_version: int) -> None:
        """The folder's manifest has vouched for the format."""


def _encode(value: Any, place: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_encode(item, f"{place}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, f"{place}[{index}]") for index, item in enumerate(value)]}
    if isinstance(value, dict):
        return {"dict": [[_encode(key, place), _encode(item, f"{place}.{key}")] for key, item in value.items()]}
    if isinstance(value, torch.Tensor) and value.numel() <= _MAX_TENSOR_ELEMENTS and not value.is_complex():
        # tolist() is exact: every dtype of torch fits a Python float or integer.
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    raise TypeError(f"the state{place} is a {type(value).__name__}; store it as a ShardedTensor or as plain numbers")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(_decode(item) for item in value["tuple"])
    if "dict" in value:
        return {_decode(key): _decode(item) for key, item in value["dict"]}
    dtype = getattr(torch, value["dtype"])
    return torch.tensor(value["tensor"], dtype=dtype).reshape(value["shape"])
