"""What makes two starts under one name the same run."""

from __future__ import annotations

import dataclasses
from typing import Any

from titans_dist.config import CheckpointError, Config

# What may not change between two starts of one run: it would be another model or another order of the data. That the
# datasets are the same is told by the data's own state.
IDENTITY = (
    *("model", "data.sequence_length", "data.documents", "data.seed", "data.shuffle_shards"),
    *("training.seed", "training.global_batch_size", "training.carry_state"),
)
# What says how the model is computed, or only helped to work out its width.
FREE = (
    *("model.memory.state_grad_clip", "model.memory.backend"),
    "model.parameters",
)


def identity(config: Config) -> dict[str, Any]:
    """Key -> value of all settings that make two starts the same run, with the model's defaults worked out."""
    flat = flatten(dataclasses.asdict(config))
    flat["model.intermediate_size"] = config.model.mlp_size
    flat |= {f"model.memory.{name}": value for name, value in config.model.memory.spec_fields().items()}
    keys = [key for key in flat if any(key == name or key.startswith(name + ".") for name in IDENTITY)]
    return {key: flat[key] for key in keys if key not in FREE}


def check_identity(saved: dict[str, Any], now: dict[str, Any], run_dir: str) -> None:
    """Raise CheckpointError naming what differs between a checkpoint's identity and the start's."""
    changed = [key for key in {**saved, **now} if saved.get(key) != now.get(key)]
    if changed:
        what = ", ".join(f"{key}={now.get(key)} (it was {saved.get(key)})" for key in changed[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise CheckpointError(
            f"{run_dir} holds another run: {what}{more}; give this one its own name=NAME or use the old values"
        )


def check_model(saved: dict[str, Any], config: Config) -> None:
    """Raise CheckpointError where a checkpoint is of another model than the configuration's."""
    now = identity(config)
    model = {key: value for key, value in saved.items() if key.startswith("model.")}
    check_identity(model, {key: value for key, value in now.items() if key.startswith("model.")}, config.run_dir)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
