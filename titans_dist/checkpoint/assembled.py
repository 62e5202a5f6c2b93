"""A checkpoint made of tensors that one process has or can make, one after the other, without a process group."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.planner import WriteItem

from titans_dist.checkpoint.common import write_common
from titans_dist.checkpoint.tensors import MOMENTS, PARAMETER


@dataclasses.dataclass(frozen=True)
class Made:
    """A tensor that is made when it is written, and let go then."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def write_assembled(folder: Path, tensors: Mapping[str, Made], common: dict[str, Any]) -> None:
    """Write into the folder of ``Store.begin`` what the engines read; one tensor is in memory at a time."""
    places = {name: torch.empty((), dtype=made.dtype).expand(made.shape) for name, made in tensors.items()}
    writer, planner = FileSystemWriter(folder, thread_count=1, sync_files=True), _Planner(tensors)
    try:
        with warnings.catch_warnings(action="ignore"):  # that there is one process: it is meant
            dcp.save(places, storage_writer=writer, planner=planner, no_dist=True)
    except dcp.CheckpointException as error:
        ((failure, _),) = error.failures.values()
        raise failure from None
    write_common(folder, common)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


def training_state(
    parameters: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    read: Callable[[str, str], Tensor | None],
    adam_step: float,
    settings: Mapping[str, Any],
) -> tuple[dict[str, Made], dict[str, Any]]:
    """The tensors and the unsharded state of a checkpoint, from the float32 weights and moments of all parameters.

    `parameters`: name -> shape. `read(name, what)`: what is "param" or one of MOMENTS; None counts as zeros. `settings`
    are those of Adam; another start brings its own anyway.
    """
    tensors: dict[str, Made] = {}

    def add(key: str, name: str, what: str, dtype: torch.dtype) -> None:
        shape = parameters[name]

        def make() -> Tensor:
            value = read(name, what)
            return torch.zeros(shape, dtype=dtype) if value is None else value.to(dtype)

        tensors[key] = Made(shape, dtype, make)

    for name in parameters:
        add(name, name, PARAMETER, dtype)
        for what in (PARAMETER, *MOMENTS):
            add(f"optimizer.state.{what}.{name}", name, what, torch.float32)
    for key, state in (("rng.cpu", torch.get_rng_state()), ("rng.cuda", torch.zeros(16, dtype=torch.uint8))):
        tensors[key] = Made(tuple(state.shape), state.dtype, lambda state=state: state)  # type: ignore[misc]
    groups = [
        {
            **settings,
            "wd_mult": decay,
            "lr_mult": 1.0,
            "is_decoupled_lr": False,
            "is_expert_parallel": False,
            "default_config": True,
            "step": adam_step,
        }
        for decay in (1.0, 0.0)
    ]
    optimizer = {"optimizer": {"param_groups": groups}, "param_state_sharding_type": "fully_reshardable"}
    return tensors, {"optimizer": optimizer}


class _Planner(DefaultSavePlanner):
    """Plans for places that hold no numbers, and makes them when they are written."""

    def __init__(self, tensors: Mapping[str, Made]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tensors = tensors

    def resolve_data(self, write_item: WriteItem) -> Any:
        made = self._tensors[write_item.index.fqn]
        value = made.make().contiguous()
        assert (tuple(value.shape), value.dtype) == (made.shape, made.dtype), write_item.index.fqn
        return value
