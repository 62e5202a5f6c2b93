"""What the ranks write into a store and read from it: sharded state on megatron-core's ``torch_dist`` format.

``save`` and ``load`` are collective: every rank of the default process group calls them. The folder must be one that
all ranks see. The files can be read by ``megatron.core.dist_checkpointing`` on any other layout of ranks.

Why not ``dist_checkpointing.save``: in 0.16.1 a rank that cannot write raises alone, in the middle of collectives in
which the others then wait (rank 0 for ``common.pt``, ``.metadata`` and ``metadata.json``, any rank for its folder and
its queue), and its writer forks processes whose death nobody notices. Here the same planner and file format are driven
in phases. A phase does its work without a collective inside, and ends with the exchange of everybody's outcome.

No pickle is trusted. Unsharded state is JSON (``common``), tensors are read with ``weights_only=True``, sharded
*objects* are refused. What remains is torch's own index, the file ``.metadata``, which upstream defines as a pickle:
it is checked against an allow-list of plain data classes before anything else reads it.
"""

from __future__ import annotations

import dataclasses
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

import titans_dist.megatron  # noqa: F401  # isort: skip  (quickens the imports below)
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter, Metadata
from torch.distributed.checkpoint.filesystem import _StoragePrefix

from titans_dist.checkpoint.common import JsonCommon, read_common, write_common
from titans_dist.checkpoint.store import Store
from titans_dist.config.errors import CheckpointError

_Result = TypeVar("_Result")

_METADATA = ".metadata"
_METADATA_CLASSES = {
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
}


@dataclasses.dataclass(frozen=True)
class SaveResult:
    """The outcome of a save, the same on every rank; ``error`` is None or one sentence."""

    seconds: float
    bytes: int
    error: str | None


class _AgreedFailure(Exception):
    """Raised on every rank at the same place, with the same sentence."""


def save(store: Store, step: int, sharded_state: dict[str, Any], meta: dict[str, Any], *, keep: int) -> SaveResult:
    """Write ``sharded_state`` as the checkpoint of ``step`` and remove all but the ``keep`` newest; collective.

    ``sharded_state`` holds ShardedTensors, JSON-like values (those of rank 0 are stored) and
    LocalNonpersistentObjects (not stored); ``meta`` is JSON for ``store.meta``. A failure on any rank raises nothing:
    every rank gets the same ``error``, earlier checkpoints stay, and a later save may succeed.
    """
    start = time.monotonic()
    size_bytes = 0
    error: str | None = None
    try:
        folder = Path(_rank_0_decides(lambda: str(store.begin(step))))
        _write(folder, sharded_state)
        size_bytes = _rank_0_decides(lambda: _size_bytes(store.commit(step, meta)))
    except _AgreedFailure as failure:
        error = f"cannot save step {step}: {failure}"
        _remove_quietly(store, step)
    else:
        try:
            _rank_0_decides(lambda: store.prune(keep))
        except _AgreedFailure as failure:
            error = f"step {step} is saved, but old checkpoints cannot be removed: {failure}"
    return SaveResult(time.monotonic() - start, size_bytes, error)


def load(store: Store, step: int, sharded_state: dict[str, Any], *, partial: bool = False) -> dict[str, Any]:
    """Read the checkpoint of ``step`` as ``sharded_state`` lays it out; collective.

    Returns a dict of the same structure with tensors in place of ShardedTensors and the stored unsharded values.
    With ``partial``, tensors that only the checkpoint has are left out (the optimizer's, for an evaluation).
    Raises CheckpointError with the same sentence on every rank: for a damaged folder, for tensors that only the
    checkpoint or only the model has, and for shapes that differ.
    """
    folder = store.folder(step)
    try:
        _rank_0_decides(lambda: store.verify(step, digests=False))
        index, common = _agreed(lambda: (_read_index(folder), read_common(folder)))
        state, requested = _agreed(lambda: _requested_shapes(sharded_state))
        everybody: list[dict[str, tuple[int, ...]]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everybody, requested)
        _agreed(lambda: _compare(folder, index, everybody, partial))
        # Keys and shapes are known to be right; megatron-core's own checks may raise on one rank and leave the others
        # waiting. From here on torch hands a failure of one rank to all.
        return _agreed(
            lambda: dist_checkpointing.load(
                state, str(folder), common_strategy=JsonCommon(common), validate_access_integrity=False
            )
        )
    except _AgreedFailure as failure:
        raise CheckpointError(f"cannot load step {step}: {failure}") from None


def newest_valid(store: Store, warn: Callable[[str], None]) -> int | None:
    """``store.newest_valid`` as rank 0 sees it, on every rank; only rank 0 warns. Collective."""
    try:
        return _rank_0_decides(lambda: store.newest_valid(warn))
    except _AgreedFailure as failure:
        raise CheckpointError(f"cannot look for checkpoints: {failure}") from None


def _write(folder: Path, sharded_state: dict[str, Any]) -> None:
    """Fill ``folder`` in phases, each agreed on by all ranks; raises _AgreedFailure on all of them."""
    rank = dist.get_rank()
    sharded, common = _agreed(lambda: save_preprocess(_without_objects(sharded_state), False))
    _, everybody = determine_global_metadata(sharded)
    _agreed(lambda: validate_sharding_integrity(everybody))  # looks at rank 0 only
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    # One thread: torch loses the exceptions of the other threads of a writer.
    writer = FileSystemWriter(folder, thread_count=1, sync_files=True)

    def plan_locally() -> Any:
        tensors, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
        planner.set_up_planner(mcore_to_pyt_state_dict(tensors, False), is_coordinator=rank == 0)
        writer.set_up_storage_writer(rank == 0)
        return writer.prepare_local_plan(planner.create_local_plan())

    plan = _agreed(plan_locally)
    plans = _gathered(plan)
    metadata: Metadata | None = _agreed(lambda: planner.create_global_plan(plans)[1] if rank == 0 else None)
    plan = planner.finish_plan(dataclasses.replace(plan, storage_data=_StoragePrefix(f"__{rank}_")))
    results = _gathered(_agreed(lambda: writer.write_data(plan, planner).value() if plan.items else []))

    def finish() -> None:
        if metadata is not None:
            write_common(folder, common)
            writer.finish(metadata, results)
            save_config(CheckpointingConfig("torch_dist", 1), str(folder))

    _agreed(finish)


def _without_objects(sharded_state: dict[str, Any]) -> dict[str, Any]:
    """A copy in which empty ShardedObjects (the ``_extra_state`` of megatron-core's linears) are not stored."""
    copy, _ = extract_matching_values(sharded_state, lambda _: True)

    def replace(value: Any) -> Any:
        if not isinstance(value, ShardedObject):
            return value
        if value.data is not None:
            raise CheckpointError(f"{value.key} would be stored as a pickle; make it a ShardedTensor or plain numbers")
        return LocalNonpersistentObject(None)

    copied: dict[str, Any] = dict_list_map_inplace(replace, copy)
    return copied


def _requested_shapes(sharded_state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The state to load, and the global shape of every tensor that this rank asks for."""
    state = _without_objects(sharded_state)
    sharded, _, _ = load_preprocess(state)
    tensors, _ = extract_sharded_base(sharded)
    return state, {tensor.key: tuple(tensor.global_shape) for tensor in nested_values(tensors)}


def _compare(folder: Path, index: Metadata, everybody: list[dict[str, tuple[int, ...]]], partial: bool) -> None:
    """Raises CheckpointError where the tensors that the ranks ask for are not those of the checkpoint."""
    stored = {key: tuple(entry.size) for key, entry in index.state_dict_metadata.items() if hasattr(entry, "size")}
    asked = {key: shape for requested in everybody for key, shape in requested.items()}
    if absent := sorted(asked.keys() - stored.keys()):
        raise CheckpointError(f"{folder} has no {_some(absent)}, which the model needs")
    unknown = sorted(stored.keys() - asked.keys())
    if unknown and not partial:
        raise CheckpointError(f"{folder} has {_some(unknown)}, for which the model has no place")
    for key in sorted(asked):
        if asked[key] != stored[key]:
            raise CheckpointError(f"{key} is {stored[key]} in {folder}, but the model needs {asked[key]}")


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


class _MetadataUnpickler(pickle.Unpickler):
    """Makes the plain data classes of torch's index and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _METADATA_CLASSES:
            raise CheckpointError(f"{_METADATA} asks for {module}.{name}, which is no part of a checkpoint's index")
        return super().find_class(module, name)


def _read_index(folder: Path) -> Metadata:
    with (folder / _METADATA).open("rb") as stream:
        metadata: Metadata = _MetadataUnpickler(stream).load()
    return metadata


def _agreed(work: Callable[[], _Result]) -> _Result:
    """Run ``work`` on this rank, then learn how it went on all; raises _AgreedFailure on all when it failed on one."""
    result: Any = None
    problem: str | None = None
    try:
        result = work()
    except (Exception, CheckpointException) as error:  # whatever it is, the peers must hear of it and not wait
        problem = _sentence(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    failed = [rank for rank, text in enumerate(problems) if text is not None]
    if failed:
        others = f" (and {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
        raise _AgreedFailure(f"rank {failed[0]}{others}: {problems[failed[0]]}")
    return result


def _rank_0_decides(work: Callable[[], _Result]) -> _Result:
    """Run ``work`` on rank 0 and give its result to all; raises _AgreedFailure on all when it failed."""
    result = [_agreed(lambda: work() if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(result, src=0)
    return result[0]  # type: ignore[return-value]


def _gathered(value: Any) -> list[Any]:
    """The values of all ranks on rank 0, an empty list elsewhere."""
    values: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(value, values or None, dst=0)
    return values


def _sentence(error: BaseException) -> str:
    """One line for ``error``, or for the cause of it that a person can mend.

    torch hides "No space left on device" behind an error of its own zip writer, and wraps the failures of a load.
    """
    if isinstance(error, CheckpointException):  # a BaseException of torch, the same on all ranks
        rank, (failure, _) = next(iter(error.failures.items()))
        return f"{_sentence(failure)} (on rank {rank})"
    if isinstance(error, pickle.UnpicklingError):  # torch's text is an advice to unpickle anything
        return "a file of tensors is damaged and cannot be read"
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError | CheckpointError):
        cause = cause.__cause__ or cause.__context__
    shown = cause or error
    line = (str(shown).strip().splitlines() or ["no message"])[0]
    return line if shown is cause else f"{type(shown).__name__}: {line}"


def _remove_quietly(store: Store, step: int) -> None:
    """All ranks have stopped writing; what cannot be removed is a leftover and no checkpoint."""
    if dist.get_rank() == 0:
        try:
            store.abort(step)
        except OSError:
            return


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
