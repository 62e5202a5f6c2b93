"""The keys of the configuration, read off the dataclasses: which is nearest, and what a key expects."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import titans_dist
from titans_dist.config import Config

CONFIGS = Path(titans_dist.__file__).parent / "configs"
HINT = "titans-dist train --cfg job prints every key"

_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def schema() -> dict[str, Any]:
    """Every full key, such as model.memory.depth, with its type; sections are keys too."""
    return dict(_walk("", Config))


def groups() -> list[str]:
    """The configuration groups, such as model and memory."""
    return sorted(path.name for path in CONFIGS.iterdir() if path.is_dir())


def nearest(key: str) -> str | None:
    """The full key or group that was most likely meant by `key`."""
    keys = list(schema())
    last = key.rpartition(".")[2]
    for same in ([k for k in keys if k.endswith("." + key)], [k for k in keys if k.rpartition(".")[2] == last]):
        if same:
            return same[0]
    close = difflib.get_close_matches(key, [*keys, *groups()], n=1, cutoff=0.7)
    if close:
        return close[0]
    lasts = {k.rpartition(".")[2]: k for k in keys}
    close = difflib.get_close_matches(last, lasts, n=1)
    return lasts[close[0]] if close else None


def unknown(key: str) -> str:
    """One sentence for a key that does not exist."""
    for own in (key, key.rpartition(".")[0]):
        if typing.get_origin(schema().get(own)) is dict:
            return f"{own} has keys of your own; add each by itself, as +{own}.NAME=VALUE"
    near = nearest(key)
    return f"unknown key {key}; did you mean {near}? ({HINT})" if near else f"unknown key {key}; {HINT}"


def expected(key: str) -> str:
    """What `key` takes, in words."""
    kind = schema().get(key)
    if kind is None:
        return "another value"
    if dataclasses.is_dataclass(kind):
        inner = [name for name in schema() if name.startswith(key + ".")]
        return f"a section; set the keys below it, such as {inner[0]}"
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    words = [_TYPES.get(option, str(option)) for option in options if option is not type(None)]
    return " or ".join([*words, *(["null"] if type(None) in options else [])])


def strays(config: Mapping[str, Any]) -> list[str]:
    """Keys of a composed configuration that the schema lacks; Hydra lets `+key=value` add anything."""
    known = schema()
    return [key for key in _flat("", config, known) if key not in known]


def _walk(prefix: str, kind: type) -> Iterator[tuple[str, Any]]:
    for name, hint in typing.get_type_hints(kind).items():
        yield prefix + name, hint
        if dataclasses.is_dataclass(hint):
            yield from _walk(f"{prefix}{name}.", typing.cast(type, hint))


def _flat(prefix: str, node: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[str]:
    for name, value in node.items():
        yield f"{prefix}{name}"
        # The keys of a dictionary are the user's own.
        if isinstance(value, Mapping) and typing.get_origin(known.get(f"{prefix}{name}")) is not dict:
            yield from _flat(f"{prefix}{name}.", value, known)
