"""`titans-dist checkpoint diff`: what differs between two checkpoints, tensor by tensor."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from titans_dist.checkpoint.store import Store
from titans_dist.config import CheckpointError, Config, ConfigError
from titans_launch import tables
from titans_launch.checkpoint import opened

if TYPE_CHECKING:
    from titans_dist.checkpoint.tensors import Tensors

SHOWN = 40
"""Tensors that differ in the table: the model's before the optimizer's, those that differ most first."""
WIDTH = 100
"""Characters of a value in the table."""
STATES = ("optimizer.", "carried.", "rng.")
"""What the names of tensors begin with that are no weights."""


@dataclasses.dataclass(frozen=True)
class Compared:
    """One tensor of two checkpoints."""

    name: str
    note: str = ""
    """Why there are no numbers: it is in one of them alone, or has another shape."""
    max_difference: float = 0.0
    relative: float = 0.0
    """The norm of the difference as a share of the first one's norm."""

    @property
    def is_equal(self) -> bool:
        """Whether they are the same, bit by bit but for the sign of zeros."""
        return not self.note and self.max_difference == 0


def run(config: Config) -> None:
    """Compare two steps of the run, or its step with one of the run folder export.path."""
    with warnings.catch_warnings(action="ignore"):  # megatron-core's, of what it misses
        from titans_dist.checkpoint.tensors import Tensors

    one, other = pair(config)
    compared = list(compare(Tensors(one[0].folder(one[1])), Tensors(other[0].folder(other[1]))))
    show_values(one, other)
    show_tensors(compared)


def pair(config: Config) -> tuple[tuple[Store, int], tuple[Store, int]]:
    """The two checkpoints: each a store and a step."""
    mine, inspect = opened.store(config), config.inspect
    if config.export.path is not None:
        theirs = Store(store_folder(Path(config.export.path)))
        step = opened.step(mine, inspect.step)
        return (mine, step), (theirs, opened.step(theirs, inspect.to_step or inspect.step))
    steps = mine.committed()
    if inspect.step is None and len(steps) < 2:
        raise CheckpointError(
            f"{tables.place(mine.root)} has {len(steps)} checkpoints, and two are compared; add --path "
            "RUN_FOLDER to compare with those of another run"
        )
    last = opened.step(mine, inspect.to_step)
    first = opened.step(mine, inspect.step) if inspect.step else max([s for s in steps if s < last], default=last)
    if first == last:
        raise ConfigError(f"both are step {last}; name two steps with inspect.step and inspect.to_step")
    return (mine, first), (mine, last)


def store_folder(folder: Path) -> Path:
    """The folder of checkpoints of another run, named by it or by the run folder."""
    return folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder


def compare(one: Tensors, other: Tensors) -> Iterator[Compared]:
    """Every tensor of either; no more than one of each is in memory at a time."""
    for name in sorted({*one.names, *other.names}):
        if name not in one.names or name not in other.names:
            yield Compared(name, f"only in the {'first' if name in one.names else 'second'}")
        elif one.shape(name) != other.shape(name):
            yield Compared(name, f"of shape {one.shape(name)} and {other.shape(name)}")
        else:
            before = one.read(name).double()
            norm, difference = float(before.norm()), other.read(name).double().sub_(before)
            size = float(difference.norm())
            yield Compared(name, "", float(difference.abs_().max()), size / norm if norm else size)


def show_values(one: tuple[Store, int], other: tuple[Store, int]) -> None:
    """Print what the two say of themselves, where they say different things."""
    before, after = (flat(store.meta(step)) for store, step in (one, other))
    table = Table(title="what was saved beside the tensors", title_justify="left")
    for name in ("", *(tables.place(store.folder(step)) for store, step in (one, other))):
        table.add_column(name, overflow="fold")
    for key in {**before, **after}:
        if before.get(key) != after.get(key):
            table.add_row(key, *(short(each[key]) if key in each else "" for each in (before, after)))
    tables.console().print(table)


def short(value: Any) -> str:
    """A value as JSON, of a long one the beginning."""
    text = json.dumps(value)
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries by their dotted names.

    >>> flat({"a": {"b": 1}, "c": [2], "d": [{"e": 3}]})
    {'a.b': 1, 'c': [2], 'd.0.e': 3}
    """
    if isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else key)
    return found


def show_tensors(compared: list[Compared]) -> None:
    """Print the tensors that differ, and how many are equal."""
    different = sorted(
        (one for one in compared if not one.is_equal),
        key=lambda one: (not one.note, one.name.startswith(STATES), -one.relative, one.name),
    )
    table = Table(title="tensors", title_justify="left")
    table.add_column("", overflow="fold")
    for name in ("largest difference", "relative"):
        table.add_column(name, justify="right")
    for one in different[:SHOWN]:
        numbers = (one.note, "") if one.note else (f"{one.max_difference:.3e}", f"{one.relative:.3e}")
        table.add_row(one.name, *numbers)
    if different:
        tables.console().print(table)
    if len(different) > SHOWN:
        print(f"and {len(different) - SHOWN:,} more")
    print(f"{len(compared) - len(different):,} of {len(compared):,} tensors are equal")
