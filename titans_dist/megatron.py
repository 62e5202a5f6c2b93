"""Imports megatron-core quickly and quietly: 1 s instead of 3, for every process of every start.

On import, megatron-core wraps fused functions of its own models in torch.compile, which loads the whole compiler, and
tries to import wandb. Nothing here uses those functions or that logging, so both are put aside while it loads.
Importing this module before any `megatron` import is enough; it does nothing where megatron-core is there already.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

# What the libraries say about themselves and no user can act on.
for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    ".*is deprecated.*",
    ".*grad attribute of a Tensor that is not a leaf.*",
):
    warnings.filterwarnings("ignore", message=_message)
# megatron-core's overlap of communication on GPUs counts on one hardware queue.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def _uncompiled(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    return function if function is not None else lambda decorated: decorated


@contextlib.contextmanager
def _put_aside() -> Iterator[None]:
    compile_, had_wandb = torch.compile, "wandb" in sys.modules
    torch.compile = _uncompiled  # type: ignore[assignment]
    if not had_wandb:
        sys.modules["wandb"] = None  # type: ignore[assignment]  # makes its import fail
    try:
        yield
    finally:
        torch.compile = compile_
        if not had_wandb:
            del sys.modules["wandb"]


if "megatron.core" not in sys.modules:
    with _put_aside():
        for _name in ("pipeline_parallel", "distributed", "optimizer", "dist_checkpointing"):
            importlib.import_module(f"megatron.core.{_name}")
