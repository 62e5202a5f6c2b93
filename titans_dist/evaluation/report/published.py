"""Figures of the papers, which the report prints beside ours and marks as theirs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml


@dataclass(frozen=True)
class Source:
    """Where a figure is from."""

    paper: str
    place: str
    """Table or figure of the paper."""
    setting: str
    """Size and training of the models, and what else must be known."""

    def __str__(self) -> str:
        return f"{self.paper}, {self.place}; {self.setting}"


@dataclass(frozen=True)
class Published:
    """One row of a paper."""

    model: str
    source: Source
    accuracy: dict[int, float]
    """Length of the context: share of right answers."""


@dataclass(frozen=True)
class Language:
    """A row of a paper's table of language modeling; None where a figure is not published."""

    model: str
    source: Source
    wikitext_perplexity: float | None
    lambada_perplexity: float | None
    common_sense: float | None
    """Mean accuracy of eight tasks."""


def accuracy(task: str, lengths: list[int]) -> list[Published]:
    """The rows of a task that have a figure of any of the lengths."""
    found = []
    for group in _data()["accuracy"]:
        if group["task"] != task:
            continue
        for model, percents in group["rows"].items():
            shares = {
                length: percent / 100
                for length, percent in zip(group["lengths"], percents, strict=True)
                if length in lengths and percent is not None
            }
            if shares:
                found.append(Published(model, Source(**group["source"]), shares))
    return found


def language() -> list[Language]:
    """All rows of language modeling."""
    return [
        Language(model, Source(**group["source"]), wiki, lambada, None if percent is None else percent / 100)
        for group in _data()["language"]
        for model, (wiki, lambada, percent) in group["rows"].items()
    ]


@cache
def _data() -> dict[str, Any]:
    return yaml.safe_load((files(__package__) / "published.yaml").read_text(encoding="utf-8"))
