"""How the ranks write a copied state into one folder, in megatron-core's ``torch_dist`` format.

Why not ``dist_checkpointing.save``: in 0.16.1 a rank that cannot write raises alone, in the middle of collectives in
which the others then wait (rank 0 for ``common.pt``, ``.metadata`` and ``metadata.json``, any rank for its folder and
its queue), its writer forks processes whose death nobody notices, and it knows only the default process group, which
training uses at the same time. Here the same planner and file format are driven in phases (see ``agreement``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import titans_dist.megatron  # noqa: F401  # isort: skip  (quickens the imports below)
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from megatron.core.dist_checkpointing.validation import validate_sharding_integrity
from torch.distributed.checkpoint import FileSystemWriter, Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.storage import WriteResult

from titans_dist.checkpoint.agreement import Agreement
from titans_dist.checkpoint.common import COMMON
from titans_dist.checkpoint.host import HostCopy
from titans_dist.checkpoint.store import Entry, entry


class Plan:
    """Which rank writes what. The constructor is collective; raises AgreedFailure for what does not fit together."""

    def __init__(self, ranks: Agreement, copy: HostCopy) -> None:
        self.ranks, self.common = ranks, copy.common
        layouts = ranks.gathered(copy.layout)
        ranks.agreed(lambda: validate_sharding_integrity(layouts))  # looks at rank 0 only
        self._planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)

        def plan_locally() -> Any:
            self._planner.set_up_planner(mcore_to_pyt_state_dict(copy.tensors, False), is_coordinator=ranks.rank == 0)
            return self._planner.create_local_plan()

        plan = ranks.agreed(plan_locally)
        plans = ranks.gathered(plan)
        self._metadata: Metadata | None = ranks.agreed(
            lambda: self._planner.create_global_plan(plans)[1] if ranks.rank == 0 else None
        )
        self._plan = self._planner.finish_plan(plan)

    def write(self, folder: Path) -> dict[str, Entry]:
        """Fill an empty folder that all ranks see; on rank 0, the manifest's entries of all its files.

        Each rank hashes what it wrote. Collective; raises AgreedFailure. May be called again after a failure.
        """
        name = f"__{self.ranks.rank}_0.distcp"

        def write_own() -> tuple[list[WriteResult], dict[str, Entry]]:
            if not self._plan.items:
                return [], {}
            return self._write_tensors(folder / name), {name: entry(folder / name)}

        results, own = self.ranks.patiently(write_own)
        written = self.ranks.gathered((results, own))

        def finish() -> dict[str, Entry]:
            if self._metadata is None:
                return {}
            (folder / COMMON).write_text(self.common, encoding="utf-8")
            FileSystemWriter(folder).finish(self._metadata, [results for results, _ in written])
            save_config(CheckpointingConfig("torch_dist", 1), str(folder))
            found = {name: value for _, own in written for name, value in own.items()}
            shared = {path.name: entry(path) for path in folder.iterdir() if path.name not in found}
            return dict(sorted((found | shared).items()))

        return self.ranks.agreed(finish)

    def _write_tensors(self, path: Path) -> list[WriteResult]:
        """What torch's FileSystemWriter writes, but one after the other: it keeps copies until the file is done."""
        results = []
        with path.open("wb") as stream:
            for item in self._plan.items:
                tensor = self._planner.resolve_data(item).detach()
                if tensor.untyped_storage().nbytes() != tensor.nbytes:
                    tensor = tensor.clone()  # a part would be stored together with the whole
                begin = stream.tell()
                torch.save(tensor, stream)
                length = stream.tell() - begin
                results.append(WriteResult(item.index, length, _StorageInfo(path.name, begin, length)))
        return results
