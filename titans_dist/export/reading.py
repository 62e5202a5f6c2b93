"""An export back into a run: a committed checkpoint of step 0 that `train` goes on from."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import SafetensorError, safe_open
from torch import Tensor

from titans_dist.checkpoint.lease import Lease
from titans_dist.checkpoint.sharded import on_rank_0, save
from titans_dist.checkpoint.store import Store
from titans_dist.config import CheckpointError, Config, ConfigError, ModelConfig
from titans_dist.config.model import MemoryConfig
from titans_dist.export.folder import CONFIG, MODEL_TYPE, check_sums
from titans_dist.export.weights import INDEX, PREFIX, SINGLE, shapes
from titans_dist.parallel.engine import Engine
from titans_dist.parallel.peers import own_versions
from titans_dist.parallel.processes import processes
from titans_dist.parallel.stage import load_model, sharded_model
from titans_dist.run.identity import identity

SHOWN = 6
"""Keys that differ in the sentence of a refusal."""


def read_export(config: Config) -> Path:
    """Make the export in export.path the checkpoint of step 0 of a new run, on every process of the job.

    Weights come in the run's precision, with exact float32 masters, and an optimizer that has not made a step. Every
    process reads its own part. Raises CheckpointError for an export that is damaged or of another model than the
    configuration's, and for a run that has checkpoints or is being trained; returns the folder of the checkpoint.
    """
    folder = Path(config.export.path or "")
    if config.export.path is None:
        raise ConfigError("checkpoint import needs to know what to read; add --path FOLDER (export.path=FOLDER)")
    store = Store(Path(config.run_dir) / "checkpoints")
    if store.committed():
        raise CheckpointError(
            f"{config.run_dir} has checkpoints already; give the run that begins with the export its own name=NAME"
        )
    check_architecture(folder, config)
    check_sums(folder)
    files = weight_files(folder, config.model)
    with processes(config) as device:
        engine = Engine(config, device)
        _take(engine, files)
        on_rank_0(lambda: setattr(store, "lease", Lease.acquire(store.root)))
        try:
            result = save(store, 0, engine.sharded_state(), _meta(config), keep=config.checkpoint.keep)
        finally:
            if store.lease is not None:
                store.lease.release()
    if result.error is not None:
        raise CheckpointError(result.error)
    return store.folder(0)


def check_architecture(folder: Path, config: Config) -> None:
    """Raise CheckpointError, naming what differs, where the export is not of the configuration's model."""
    exported = exported_model(folder)
    there, now = (
        {key: value for key, value in identity(dataclasses.replace(config, model=model)).items() if key[:6] == "model."}
        for model in (exported, config.model)
    )
    changed = [key for key in there if there[key] != now.get(key)]
    if changed:
        what = ", ".join(f"{key}={_plain(now.get(key))} (there {_plain(there[key])})" for key in changed[:SHOWN])
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise CheckpointError(f"{folder} holds another model: {what}{more}; give the export's values as overrides")


def exported_model(folder: Path) -> ModelConfig:
    """The model that an export's config.json describes. Raises CheckpointError where it is no export."""
    path = folder / CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kind = found["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is no export: {CONFIG} cannot be read ({error})") from None
    if kind != MODEL_TYPE:
        raise CheckpointError(f"{path} is of a {kind} model; only exports of titans-dist can be imported")
    own, memory = ({field.name for field in dataclasses.fields(kind)} for kind in (ModelConfig, MemoryConfig))
    fields = {key: value for key, value in found.items() if key in own}
    fields["memory"] = {key: value for key, value in fields.get("memory", {}).items() if key in memory}
    return ModelConfig(**fields)


def weight_files(folder: Path, model: ModelConfig) -> dict[str, Path]:
    """Weight of the model -> the file that has it. Raises CheckpointError where one is missing or of another shape."""
    try:
        if (folder / INDEX).is_file():
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            paths = sorted({folder / name for name in index.values()})
        else:
            paths = [folder / SINGLE]
        found: dict[str, tuple[Path, tuple[int, ...]]] = {}
        for path in paths:
            with safe_open(path, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (it is no dict)
                    found[name] = (path, tuple(tensors.get_slice(name).get_shape()))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"the weights in {folder} cannot be read: {error}") from None
    files = {}
    for name, shape in shapes(model).items():
        if PREFIX + name not in found:
            raise CheckpointError(f"{folder} has no {PREFIX + name}, which the model needs")
        files[name], there = found[PREFIX + name]
        if there != shape:
            raise CheckpointError(f"{PREFIX + name} is {there} in {folder}, but the model needs {shape}")
    return files


def _take(engine: Engine, files: dict[str, Path]) -> None:
    """Give the engine this process's part of every weight, and the optimizer the same in float32."""
    parts = [
        {name: _read(files[tensor.key], tensor) for name, tensor in sharded_model([stage]).items()}
        for stage in engine.stages
    ]
    for stage, values in zip(engine.stages, parts, strict=True):
        load_model([stage], values)
    # megatron-core wants the parts of the model under their numbers, and names as the stage has them.
    named = [{PREFIX + name: value for name, value in values.items()} for values in parts]
    engine.optimizer.reload_model_params(
        {"model": named[0]} if len(named) == 1 else {f"model{i}": values for i, values in enumerate(named)}
    )


def _read(path: Path, tensor: Any) -> Tensor:
    """The part of a weight that a ShardedTensor stands for, in float32."""
    where = tuple(
        slice(begin, begin + size) for begin, size in zip(tensor.global_offset, tensor.local_shape, strict=True)
    )
    with safe_open(path, "pt") as tensors:
        part: Tensor = tensors.get_slice(PREFIX + tensor.key)[where]
    return part.float().contiguous()


def _meta(config: Config) -> dict[str, Any]:
    """What a checkpoint of step 0 says of itself, as the training loop's do."""
    return {
        "identity": identity(config),
        "data": None,
        "wandb_id": None,
        "health": None,
        "tokens": 0,
        "loss": None,
        "job": {
            "world": dist.get_world_size(),
            "engine": "megatron",
            "zero_stage": None,
            "precision": config.training.precision,
            "layout": dataclasses.asdict(config.parallel) | {"data": parallel_state.get_data_parallel_world_size()},
            "versions": own_versions(),
        },
        "config": dataclasses.asdict(config),
        "time": round(time.time(), 3),
    }


def _plain(value: Any) -> str:
    """A value as it is written in an override.

    >>> _plain(None), _plain(True), _plain(1e-6)
    ('null', 'true', '1e-06')
    """
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)
