"""The doors to libraries that only preparing and reading datasets need (the `data` extra)."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from titans_data.errors import DataError


def import_extra(name: str) -> Any:
    """Import and return a module of the `data` extra; DataError when it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise DataError(f"{name} cannot be imported ({error}): run pip install 'titans-dist[data]'") from error


def import_streaming() -> Any:
    """Import and return mosaicml-streaming's `streaming`.

    streaming/__init__.py imports its image datasets, and with them torchvision, whose PyPI build is for CUDA and
    fails beside a CPU torch. Nothing here reads images, so an empty `streaming.vision` takes their place.
    """
    sys.modules.setdefault("streaming.vision", ModuleType("streaming.vision"))
    return import_extra("streaming")
