"""What the ranks write into a store and read from it: sharded state on megatron-core's ``torch_dist`` format.

``save`` and ``load`` are collective: every rank of the default process group calls them. The folder must be one that
all ranks see. The files can be read by ``megatron.core.dist_checkpointing`` on any other layout of ranks.

No pickle is trusted. Unsharded state is JSON (``common``), tensors are read with ``weights_only=True``, sharded
*objects* are refused. What remains is torch's own index, the file ``.metadata``, which upstream defines as a pickle:
it is checked against an allow-list of plain data classes before anything else reads it.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

import titans_dist.megatron  # noqa: F401  # isort: skip  (quickens the imports below)
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from torch.distributed.checkpoint import Metadata

from titans_dist.checkpoint.agreement import AgreedFailure, Agreement
from titans_dist.checkpoint.common import JsonCommon, read_common
from titans_dist.checkpoint.host import without_objects
from titans_dist.checkpoint.saver import Saver, SaveResult
from titans_dist.checkpoint.store import Store
from titans_dist.config.errors import CheckpointError
from titans_dist.config.run import CheckpointConfig

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


def save(store: Store, step: int, sharded_state: dict[str, Any], meta: dict[str, Any], *, keep: int) -> SaveResult:
    """One save of a `Saver` that is written, once, before this returns; collective."""
    saver = Saver(store, CheckpointConfig(keep=keep, asynchronous=False, retries=0))
    try:
        saver.start(step, sharded_state, meta)
        result = saver.wait()
    finally:
        saver.close()
    assert result is not None
    return result


def load(store: Store, step: int, sharded_state: dict[str, Any], *, partial: bool = False) -> dict[str, Any]:
    """Read the checkpoint of ``step`` as ``sharded_state`` lays it out; collective.

    Returns a dict of the same structure with tensors in place of ShardedTensors and the stored unsharded values.
    With ``partial``, tensors that only the checkpoint has are left out (the optimizer's, for an evaluation).
    Raises CheckpointError with the same sentence on every rank: for a damaged folder, for tensors that only the
    checkpoint or only the model has, and for shapes that differ.
    """
    folder, ranks = store.folder(step), Agreement()
    try:
        ranks.on_rank_0(lambda: store.verify(step, digests=False))
        index, common = ranks.agreed(lambda: (_read_index(folder), read_common(folder)))
        state, requested = ranks.agreed(lambda: _requested_shapes(sharded_state))
        everybody = ranks.everybody(requested)
        ranks.agreed(lambda: _compare(folder, index, everybody, partial))
        # Keys and shapes are known to be right; megatron-core's own checks may raise on one rank and leave the others
        # waiting. From here on torch hands a failure of one rank to all.
        return ranks.agreed(
            lambda: dist_checkpointing.load(
                state, str(folder), common_strategy=JsonCommon(common), validate_access_integrity=False
            )
        )
    except AgreedFailure as failure:
        raise CheckpointError(f"cannot load step {step}: {failure}") from None


def newest_valid(store: Store, warn: Callable[[str], None]) -> int | None:
    """``store.newest_valid`` as rank 0 sees it, on every rank; only rank 0 warns. Collective."""
    return on_rank_0(lambda: store.newest_valid(warn))


def on_rank_0(work: Callable[[], _Result]) -> _Result:
    """What `work` returns on rank 0, on every rank; raises CheckpointError on all when it failed. Collective."""
    try:
        return Agreement().on_rank_0(work)
    except AgreedFailure as failure:
        raise CheckpointError(str(failure).removeprefix("rank 0: ")) from None


def check_space(store: Store, size_bytes: int, keep: int) -> str | None:
    """Whether the disk has room for the checkpoints of a run, each of about `size_bytes`; a warning if not for all.

    Raises CheckpointError when not even one more fits. For a moment there is one more than `keep`.
    """
    folder = next(path for path in (store.root, *store.root.absolute().parents) if path.is_dir())
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < size_bytes:
        raise CheckpointError(
            f"{folder} has {_gb(free_bytes)} of free space and a checkpoint takes {_gb(size_bytes)}: make room, or "
            "set run_dir to a larger disk"
        )
    fitting = len(store.committed()) + free_bytes // size_bytes
    if fitting > keep:
        return None
    return (
        f"{folder} has {_gb(free_bytes)} of free space, and checkpoint.keep={keep} needs room for {keep + 1} "
        f"checkpoints of {_gb(size_bytes)}: make room, or keep fewer"
    )


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.3g} GB"


def _requested_shapes(sharded_state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The state to load, and the global shape of every tensor that this rank asks for."""
    state = without_objects(sharded_state)
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
