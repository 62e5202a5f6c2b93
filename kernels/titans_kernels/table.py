"""Launch configurations: the block of hidden units and the warps of each of the memory's kernels, per GPU.

`tables/sm_90.json` is what `python -m titans_kernels.tune` found: by compiling alone, or on a GPU by timing.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

KERNELS = ("write", "read", "queries_backward", "reads_backward", "write_backward")
SEQUENTIAL = ("write", "write_backward")
TABLES = Path(__file__).parent / "tables"
TILES = ((64, 16), (64, 32), (64, 64), (64, 128), (128, 16), (128, 32), (128, 64))
"""Padded head dimensions and chunks: larger tiles have no place in registers."""
SHAPES = [(depth, dim, chunk) for depth in (1, 2) for dim, chunk in TILES]


@dataclass(frozen=True)
class Launch:
    """block: hidden units at a time, at depth 1 all; spilled: bytes that a thread spills in bfloat16 on this GPU.

    resident: take the form with the state in registers, where there is one. That is chosen by timing alone.
    """

    block: int
    warps: int
    stages: int = 1
    spilled: int = 0
    resident: bool = False


def launch_of(kernel: str, depth: int, dim: int, chunk: int, device: torch.device) -> Launch:
    """The configuration for heads padded to `dim` and chunks padded to `chunk`; smaller ones have the smallest's."""
    return table_of(_architecture(device))[kernel, depth, max(dim, 64), chunk]


@contextlib.contextmanager
def state_in_registers(device: torch.device, wanted: bool = True) -> Iterator[None]:
    """For a while the sequential kernels keep the state in registers where there is such a form, or nowhere."""
    table = table_of(_architecture(device))
    usual = dict(table)
    for key, launch in usual.items():
        table[key] = replace(launch, resident=wanted and key[0] in SEQUENTIAL)
    try:
        yield
    finally:
        table.update(usual)


@functools.cache
def table_of(architecture: str) -> dict[tuple[str, int, int, int], Launch]:
    """Kernel, depth, dim and chunk -> configuration; of a GPU that has no table, sm_90's."""
    path = TABLES / f"{architecture}.json"
    entries = json.loads((path if path.exists() else TABLES / "sm_90.json").read_text())
    return {(e.pop("kernel"), e.pop("depth"), e.pop("dim"), e.pop("chunk")): Launch(**e) for e in entries}


def write_table(architecture: str, table: dict[tuple[str, int, int, int], Launch]) -> Path:
    """Puts a table where `table_of` finds it."""
    names = ("kernel", "depth", "dim", "chunk")
    lines = [json.dumps(dict(zip(names, key, strict=True)) | vars(launch)) for key, launch in table.items()]
    path = TABLES / f"{architecture}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    table_of.cache_clear()
    return path


@functools.cache
def _architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return "sm_90"
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
