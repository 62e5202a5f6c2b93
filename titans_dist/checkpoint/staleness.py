"""Whether what is saved is what is trained.

A save that gets the state through a forgotten copy writes the same weights for hours, and everything looks well. So
every manifest has digests of each rank's largest weights, of their moments and of Adam's step, and a save whose weights
or moments are bit by bit those of the checkpoint before it is refused, if updates were made in between.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from titans_dist.checkpoint.host import HostCopy

TENSORS = 4
"""Per rank."""
NEGLIGIBLE_LR = 1e-9
"""Where the learning rate is lower, weights that do not change are no sign of anything."""

_OPTIMIZER = "optimizer."
_MOMENT = "optimizer.state.exp_avg."
_RNG = "rng."
_STEP = "step"


def digests(rank: int, copy: HostCopy) -> dict[str, str]:
    """Name -> SHA-256 of the largest weights that this rank writes and their first moments; on rank 0 also the step."""
    sizes = {key: sum(part.data.nbytes for part in parts) for key, parts in copy.tensors.items()}
    trained = [key for key in sizes if _MOMENT + key in sizes] or [key for key in sizes if key[: len(_RNG)] != _RNG]
    largest = sorted(trained, key=lambda key: (-sizes[key], key))[:TENSORS]
    chosen = [key for weight in largest for key in (weight, _MOMENT + weight) if key in sizes]
    found = {f"{rank}/{key}": _digest(copy, key) for key in chosen}
    if copy.numbers.get("step"):
        found[_STEP] = " ".join(f"{number:g}" for number in copy.numbers["step"])
    return found


def stale(new: dict[str, str], meta: dict[str, Any], lr: list[float], before: dict[str, Any] | None) -> str | None:
    """What is wrong with a save of these digests, as the end of a sentence, or None.

    `lr`: the learning rates in it. `before`: the manifest of the checkpoint before it, if there is one.
    """
    if before is None or not _has_updates(meta, before["meta"]):
        return None
    old, since = before["digests"], f"as in step {before['step']}, although the model was updated since"
    mend = "what is saved is not what is trained"
    if _STEP in new and new[_STEP] == old.get(_STEP):
        return f"the optimizer's step is {new[_STEP]} {since}: {mend}"
    is_moving = max(lr, default=1.0) >= NEGLIGIBLE_LR
    groups: dict[tuple[str, bool], list[str]] = {}
    for name in new:
        if name != _STEP:
            rank, key = name.split("/", 1)
            groups.setdefault((rank, key.startswith(_OPTIMIZER)), []).append(name)
    for (rank, is_moment), names in groups.items():
        if (is_moment or is_moving) and all(new[name] == old.get(name) for name in names):
            first = names[0].split("/", 1)[1]
            return f"rank {rank} gave the same {first} {since}: {mend}"
    return None


def _has_updates(meta: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether the model was updated between two saves, which is taken for granted where nothing says otherwise."""
    now, then = ((data.get("health") or {}).get("updates") for data in (meta, before))
    return now is None or now != then


def _digest(copy: HostCopy, key: str) -> str:
    digest = hashlib.sha256()
    for part in sorted(copy.tensors[key], key=lambda part: part.global_offset):
        # .numpy() has no bfloat16; the bytes of a contiguous tensor are there without it.
        digest.update(part.data.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
