"""The weights of a checkpoint as safetensors files, one tensor after the other."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from titans_dist.checkpoint.tensors import Tensors
from titans_dist.config import CheckpointError, ModelConfig
from titans_dist.model import LanguageModel

PREFIX = "model."
"""What the names of weights begin with in an export: it is the attribute of TitansForCausalLM that has them."""
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of the model, in its order; a tied one has the embedding's name."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in LanguageModel(model).named_parameters()}


def write_weights(folder: Path, tensors: Tensors, model: ModelConfig, shard_bytes: int) -> torch.dtype:
    """Write the model's weights to files of at most `shard_bytes` (but one tensor is never cut), with their index.

    No more than one file is in memory. Returns the type of the weights. Raises CheckpointError where the checkpoint
    has not these weights.
    """
    names = _checked(tensors, model)
    files = _files(names, tensors, shard_bytes)
    for file, held in files.items():
        path = folder / file
        path.touch()
        mode = path.stat().st_mode
        save_file({PREFIX + name: tensors.read(name) for name in held}, path, metadata={"format": "pt"})
        path.chmod(mode)  # the library makes files that their owner alone can read
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(_size_bytes(tensors, name) for name in names)},
            "weight_map": {PREFIX + name: file for file, held in files.items() for name in held},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return tensors.dtype(names[0])


def _checked(tensors: Tensors, model: ModelConfig) -> list[str]:
    wanted, there = shapes(model), set(tensors.names)
    for name, shape in wanted.items():
        if name not in there:
            raise CheckpointError(f"{tensors.folder} has no {name}, which the model of its configuration has")
        if tensors.shape(name) != shape:
            raise CheckpointError(f"{name} is {tensors.shape(name)} in {tensors.folder}, but the model's is {shape}")
    return list(wanted)


def _files(names: list[str], tensors: Tensors, shard_bytes: int) -> dict[str, list[str]]:
    """File -> the weights in it, in the order of the model."""
    held: list[list[str]] = [[]]
    size_bytes = 0
    for name in names:
        more = _size_bytes(tensors, name)
        if held[-1] and size_bytes + more > shard_bytes:
            held.append([])
            size_bytes = 0
        held[-1].append(name)
        size_bytes += more
    if len(held) == 1:
        return {SINGLE: held[0]}
    return {f"model-{i:05d}-of-{len(held):05d}.safetensors": part for i, part in enumerate(held, 1)}


def _size_bytes(tensors: Tensors, name: str) -> int:
    return math.prod(tensors.shape(name)) * tensors.dtype(name).itemsize
