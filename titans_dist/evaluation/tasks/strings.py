"""The strings of the benchmarks, which lie beside the code as data, each file with its source and license."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class About:
    """What a reader of its results must know of a task."""

    text: str
    """What it asks, in a few words."""
    chance: float | None
    """How often one is right who knows the task, has not read the context, and guesses. None: unknown."""


def about(name: str) -> About:
    """Of a task, or of the mean of several; of one that is not known here, its name says all."""
    found = strings("about").get(name.removesuffix("_finetuned"))
    if found is None:
        return About("", None)
    more = ", by the protocol for models that were trained on the task" if name.endswith("_finetuned") else ""
    return About(found["about"] + more, found["chance"])
