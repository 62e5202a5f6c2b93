"""The strings of the benchmarks, which lie beside the code as data, each file with its source and license."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import yaml


@cache
def strings(name: str) -> dict[str, Any]:
    """The content of `name`.yaml."""
    return yaml.safe_load((files(__package__) / f"{name}.yaml").read_text(encoding="utf-8"))


@cache
def words(kind: str) -> tuple[str, ...]:
    """The adjectives or nouns."""
    return tuple(strings("words")[kind].split())
