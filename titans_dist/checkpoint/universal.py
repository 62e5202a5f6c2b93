"""DeepSpeed's universal checkpoint: every parameter whole, in a folder of its own, written and read without DeepSpeed.

    folder/latest_universal                       "step_00000040"
    folder/step_00000040/
      mp_rank_00_model_states.pt                  counters; for ZeRO-3 also as zero_pp_rank_0_mp_rank_00_model_states.pt
      zero/optimizer_state.pt                     the same for all parameters
      zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt

DeepSpeed 0.19.8 reads the settings of its optimizer's groups from there too, and a group that the file lacks it does
not load at all, without a word. So there are many groups here, and all are empty: settings are those of the job that
loads.

What DeepSpeed's own converter makes of a ZeRO-1 or 2 checkpoint, its ZeRO-3 cannot load: it looks for Adam's step in
another place and under another name of file. Here it is in both.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titans_dist.checkpoint.tensors import MOMENTS, PARAMETER, Tensors
from titans_dist.config.errors import CheckpointError

LATEST = "latest_universal"
WEIGHTS = "fp32"
"""What DeepSpeed calls PARAMETER; moments have the same names."""
DEEPSPEED = "0.19.8"
"""The version whose format this is."""
GROUPS = 256
"""More than any optimizer has groups of parameters."""


def write_universal(tensors: Tensors, folder: Path, tag: str, axes: Mapping[str, int], counters: dict[str, int]) -> int:
    """Write `folder/tag` and `folder/latest_universal`; one tensor is in memory at a time. Returns the bytes written.

    `axes`: parameter -> the dimension along which tensor-parallel processes split it, where that is not the first.
    `counters`: global_steps and global_samples.
    """
    root, step = folder / tag, tensors.adam_step
    (root / "zero").mkdir(parents=True)
    for name in tensors.parameters:
        place = root / "zero" / name
        place.mkdir()
        for what in (PARAMETER, *MOMENTS):
            value = tensors.read(f"optimizer.state.{what}.{name}")
            torch.save({"param": value, "cat_dim": axes.get(name, 0)}, place / f"{_theirs(what)}.pt")
        torch.save(torch.tensor(step), place / "step.pt")
    groups: list[dict[str, Any]] = [{} for _ in range(GROUPS)]
    zero_3 = {"state": {0: {"step": torch.tensor(step)}}, "param_groups": groups}
    torch.save(
        {"ds_version": DEEPSPEED, "param_groups": groups, "optimizer_state_dict": zero_3},
        root / "zero" / "optimizer_state.pt",
    )
    done = counters["global_steps"]
    model = {
        "module": {},  # DeepSpeed takes the weights from zero/
        **counters,
        "skipped_steps": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_version": DEEPSPEED,
        "lr_scheduler": {"last_batch_iteration": done, "last_epoch": done},
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.4},
    }
    for prefix in ("", "zero_pp_rank_0_"):
        torch.save(model, root / f"{prefix}mp_rank_00_model_states.pt")
    (folder / LATEST).write_text(tag)
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


class Universal:
    """A universal checkpoint to read: `folder` holds `latest_universal`, or is what that names.

    Files are read with `weights_only=True`. Raises CheckpointError where it is none.
    """

    def __init__(self, folder: Path) -> None:
        latest = folder / LATEST
        self.root = folder / latest.read_text().strip() if latest.is_file() else folder
        self._zero = self.root / "zero"
        found = {str(path.parent.relative_to(self._zero)) for path in self._zero.rglob(f"{WEIGHTS}.pt")}
        if not found:
            raise CheckpointError(
                f"{folder} is no universal checkpoint: neither it nor what {LATEST} names has zero/<parameter>/"
                f"{WEIGHTS}.pt; make one with deepspeed.checkpoint.ds_to_universal and name its output folder"
            )
        self._names, self._prefix = found, ""
        self._shapes: Mapping[str, tuple[int, ...]] = {}

    def match(self, parameters: Mapping[str, tuple[int, ...]]) -> None:
        """Find the parameters of a model, all below one prefix. Raises CheckpointError for what is missing or more."""
        first = next(iter(parameters))
        prefixes = sorted((n.removesuffix(first) for n in self._names if n.endswith(first)), key=len)
        self._prefix = next((p for p in prefixes if all(p + name in self._names for name in parameters)), "")
        missing = [name for name in parameters if self._prefix + name not in self._names]
        # The converter also writes what has no moments: buffers, and a tied weight once more.
        more = sorted(
            name
            for name in self._names - {self._prefix + name for name in parameters}
            if (self._zero / name / f"{MOMENTS[0]}.pt").is_file()
        )
        for names, what in ((missing, "lacks"), (more, "has")):
            if names:
                others = f" and {len(names) - 1} more" if len(names) > 1 else ""
                not_ = "" if what == "lacks" else "not "
                raise CheckpointError(
                    f"{self.root} {what} {names[0]}{others}, which the configured model does {not_}have; give the "
                    "overrides of the model that was trained"
                )
        self._shapes = parameters
        for name, shape in parameters.items():
            stored = tuple(self._tensor(name, WEIGHTS).shape)
            if stored not in (shape, (math.prod(shape),)):
                raise CheckpointError(
                    f"{name} is {stored} in {self.root}, but {shape} in the configured model; give the overrides "
                    "of the model that was trained"
                )

    def adam_step(self) -> float | None:
        """Steps that Adam has made, if the checkpoint says so."""
        for name in sorted(self._names):
            if (self._zero / name / "step.pt").is_file():
                return float(self._load(name.removeprefix(self._prefix), "step"))
        return None

    def read(self, name: str, what: str) -> Tensor | None:
        """After `match`, a parameter's float32 value or a moment; None for a moment that DeepSpeed has never made."""
        if what != PARAMETER and not (self._zero / (self._prefix + name) / f"{what}.pt").is_file():
            return None
        return self._tensor(name, _theirs(what)).reshape(self._shapes[name])

    def _tensor(self, name: str, what: str) -> Tensor:
        """In a dictionary, or of ZeRO-3 by itself and flat."""
        stored = self._load(name, what)
        value = stored.get("param") if isinstance(stored, dict) else stored
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{self._zero / (self._prefix + name) / what}.pt holds no tensor")
        return value

    def _load(self, name: str, what: str) -> Any:
        path = self._zero / (self._prefix + name) / f"{what}.pt"
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            why = "it is not plain tensors" if isinstance(error, pickle.UnpicklingError) else str(error).splitlines()[0]
            raise CheckpointError(f"{path} cannot be read: {why}") from None


def _theirs(what: str) -> str:
    return WEIGHTS if what == PARAMETER else what
