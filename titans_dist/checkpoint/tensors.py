"""The tensors of a checkpoint one after the other, whole, in a single process without a process group."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from titans_dist.checkpoint.common import read_common
from titans_dist.checkpoint.sharded import _read_index
from titans_dist.config.errors import CheckpointError

PARAMETER = "param"
"""The float32 value of a parameter, as `optimizer.state.param.<name>`."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's, as `optimizer.state.<moment>.<name>`."""
_OPTIMIZER = f"optimizer.state.{PARAMETER}."


class Tensors:
    """What lies in the folder of a committed step. Raises CheckpointError where its index cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._index = _read_index(folder)
            self.common: dict[Any, Any] = read_common(folder)
        except (OSError, ValueError, EOFError) as error:
            raise CheckpointError(f"{folder} cannot be read: {error}") from None
        self._entries = {
            name: entry
            for name, entry in self._index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    @property
    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._entries)

    @property
    def parameters(self) -> list[str]:
        """The names of the model's parameters, sorted."""
        return [name.removeprefix(_OPTIMIZER) for name in self.names if name.startswith(_OPTIMIZER)]

    @property
    def adam_step(self) -> float:
        """Steps that Adam has made."""
        return float(self.common["optimizer"]["optimizer"]["param_groups"][0]["step"])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return tuple(self._entries[name].size)

    def dtype(self, name: str) -> torch.dtype:
        """The type it is stored in."""
        return self._entries[name].properties.dtype

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        value = torch.empty(self.shape(name), dtype=self.dtype(name))
        try:
            with warnings.catch_warnings(action="ignore"):  # that there is one process: it is meant
                dcp.load({name: value}, storage_reader=_Reader(self.folder, self._index), no_dist=True)
        except dcp.CheckpointException as error:
            raise CheckpointError(
                f"{name} cannot be read from {self.folder}; titans-dist checkpoint verify names the "
                "files that are damaged"
            ) from error
        return value


class _Reader(FileSystemReader):
    """Takes the index that was checked, and unpickles none."""

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index
