"""`titans-dist checkpoint convert`: to DeepSpeed's universal checkpoint, and back."""

from __future__ import annotations

import dataclasses
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

from titans_dist.checkpoint.lease import Lease
from titans_dist.checkpoint.store import Store
from titans_dist.config import CheckpointError, Config, ConfigError
from titans_launch import tables
from titans_launch.checkpoint import opened


def run(config: Config, read: bool = False) -> None:
    """Write the checkpoint of a step, by default the newest, to export.path; with `read`, make one of export.path."""
    with warnings.catch_warnings(action="ignore"):  # megatron-core's, of what it misses
        if read:
            taken(config)
        else:
            written(config)


def written(config: Config) -> None:
    """Our checkpoint -> DeepSpeed's."""
    import torch

    from titans_dist.checkpoint.tensors import Tensors
    from titans_dist.checkpoint.universal import write_universal
    from titans_dist.model import LanguageModel
    from titans_dist.parallel.tensor import split_axes
    from titans_dist.run.identity import check_model

    store = opened.store(config)
    step = opened.step(store, config.inspect.step)
    store.verify(step)
    check_model(store.meta(step)["identity"], config)
    folder = Path(config.export.path or Path(config.run_dir) / "export" / f"deepspeed-{step}")
    if folder.exists():
        raise ConfigError(f"{tables.place(folder)} exists already; name another folder with --path, or remove it")
    with torch.device("meta"):
        axes = split_axes(LanguageModel(config.model), 2)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    started = time.monotonic()
    counters = {"global_steps": step, "global_samples": step * config.training.global_batch_size}
    size_bytes = write_universal(Tensors(store.folder(step)), temporary, store.folder(step).name, axes, counters)
    temporary.rename(folder)
    tables.show(
        "universal checkpoint of DeepSpeed",
        [
            ("of", tables.place(store.folder(step))),
            ("where", tables.place(folder)),
            ("written", f"{opened.size(size_bytes)} in {time.monotonic() - started:.1f} s"),
            ("to load it", 'engine.load_checkpoint(folder), with "checkpoint": {"load_universal": true}'),
        ],
    )


def taken(config: Config) -> None:
    """DeepSpeed's checkpoint -> ours, committed to the run."""
    import torch

    from titans_dist.checkpoint.assembled import training_state, write_assembled
    from titans_dist.checkpoint.universal import Universal
    from titans_dist.model import LanguageModel
    from titans_dist.run.identity import identity

    if config.export.path is None:
        raise ConfigError("--read needs the folder of a universal checkpoint; add --path FOLDER")
    universal = Universal(Path(config.export.path))
    with torch.device("meta"):
        parameters = {name: tuple(value.shape) for name, value in LanguageModel(config.model).named_parameters()}
    universal.match(parameters)
    adam_step = universal.adam_step()
    step = config.inspect.step or int(adam_step or 0)
    if step < 1:
        raise ConfigError(f"{tables.place(universal.root)} does not say how many steps were made; add --step N")
    store = Store(Path(config.run_dir) / "checkpoints")
    if step in store.committed():
        raise CheckpointError(
            f"{tables.place(store.folder(step))} exists already; give the checkpoint a run of its own with name=NAME"
        )
    optimizer, dtype = config.optimizer, getattr(torch, config.training.precision)
    settings = {"lr": optimizer.lr, "betas": (optimizer.beta1, optimizer.beta2), "eps": optimizer.eps}
    settings |= {"weight_decay": optimizer.weight_decay, "max_lr": optimizer.lr}
    settings["min_lr"] = optimizer.lr * optimizer.min_lr_ratio
    tensors, common = training_state(parameters, dtype, universal.read, adam_step or float(step), settings)
    lease = Lease.acquire(store.root)
    try:
        store = Store(store.root, lease)
        write_assembled(store.begin(step), tensors, common)
        store.commit(step, meta(config, identity(config), step))
    except BaseException:
        store.abort(step)
        raise
    finally:
        lease.release()
    tables.show(
        "checkpoint",
        [
            ("of", tables.place(universal.root)),
            ("where", tables.place(store.folder(step))),
            ("to go on", f"titans-dist train name={config.name}, with the same overrides"),
        ],
    )


def meta(config: Config, identity: dict[str, Any], step: int) -> dict[str, Any]:
    """What is known of a checkpoint that another program wrote; of its data nothing is."""
    tokens = step * config.training.global_batch_size * config.data.sequence_length
    return {
        "identity": identity,
        "data": None,
        "wandb_id": None,
        "health": None,
        "tokens": tokens,
        "loss": None,
        "config": dataclasses.asdict(config),
        "job": None,
        "time": time.time(),
    }
