"""The model as a table: what it is made of and how each part may be split."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn

from titans_dist.config import ModelConfig
from titans_dist.model.language_model import LanguageModel

Row = tuple[str, str, int, str]


def planned(model: LanguageModel, tensor_parallel: int) -> Iterator[tuple[str, nn.Module, str, str]]:
    """(path of the module, the module, child name, kind) for every entry of every plan in the model.

    Where more processes than heads share the model, a module's `full_width` says what of its plan is different.
    """
    is_full_width = tensor_parallel > model.config.num_heads
    for path, module in model.named_modules():
        plan = getattr(module, "plan", {}) | (getattr(module, "full_width", {}) if is_full_width else {})
        for child, kind in plan.items():
            if getattr(module, child, None) is not None:
                yield path, module, child, kind


def describe(config: ModelConfig, tensor_parallel: int = 1) -> list[Row]:
    """Rows (parameter, shape, number of parameters, how it is split); the blocks, all alike, share their rows."""
    with torch.device("meta"):
        model = LanguageModel(config)
    kinds = {f"{path}.{child}".lstrip("."): kind for path, _, child, kind in planned(model, tensor_parallel)}
    rows: dict[str, Row] = {}
    for name, value in model.named_parameters():
        kind = next((k for prefix, k in kinds.items() if name == prefix or name.startswith(prefix + ".")), "")
        key = re.sub(r"^blocks\.\d+\.", f"blocks.0-{config.num_layers - 1}.", name)
        count = value.numel() + (rows[key][2] if key in rows else 0)
        rows[key] = (key, " x ".join(map(str, value.shape)), count, _split(kind, tensor_parallel))
    return list(rows.values())


def _split(kind: str, ways: int) -> str:
    if ways == 1 or kind in ("", "norm", "shared", "whole"):
        return "whole"
    parts = {"row": "inputs", "input": "inputs", "hidden": "hidden units", "heads": "heads", "vocabulary": "rows"}
    return f"{parts.get(kind, 'outputs')} / {ways}"
