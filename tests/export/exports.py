"""Checkpoints of tiny models of every kind, and their exports."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from titans_dist.checkpoint.common import write_common
from titans_dist.checkpoint.store import Store
from titans_dist.config import Config, DataConfig, ModelConfig
from titans_dist.export import Exported, export
from titans_dist.model import LanguageModel, build_model
from titans_dist.run.identity import identity

STEP = 7


def config(folder: Path, model: ModelConfig, **data: Any) -> Config:
    """The configuration of the run in `folder`."""
    return Config(
        name=folder.name,
        run_dir=str(folder),
        model=model,
        data=DataConfig(**{"format": "synthetic", "path": "none", "sequence_length": 32, **data}),
    )


def checkpoint(run: Config, model: LanguageModel, step: int = STEP, **meta: Any) -> Path:
    """Commit the weights of `model`, with moments beside them, as torch itself writes checkpoints."""
    store = Store(Path(run.run_dir) / "checkpoints")
    weights: dict[str, Tensor] = {name: value.detach() for name, value in model.named_parameters()}
    moments = {f"optimizer.state.exp_avg.{name}": torch.zeros_like(value) for name, value in weights.items()}
    folder = store.begin(step)
    dcp.save({**weights, **moments}, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    write_common(folder, {})
    told = {"identity": identity(run), "config": dataclasses.asdict(run), "tokens": 1234, "loss": 2.5, "data": None}
    return store.commit(step, told | meta)


def random_model(model: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 1) -> LanguageModel:
    """A model of which no weight is as it was before training."""
    made = build_model(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in made.parameters():
            value += 0.05 * torch.randn(value.shape, generator=generator)
    return made.to(dtype)


def exported(
    folder: Path, model: ModelConfig, dtype: torch.dtype = torch.float32, **data: Any
) -> tuple[LanguageModel, Exported]:
    """A random model, and what its run's checkpoint was exported to."""
    made, run = random_model(model, dtype), config(folder, model, **data)
    checkpoint(run, made)
    return made, export(run, STEP)
