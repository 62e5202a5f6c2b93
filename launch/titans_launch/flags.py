"""Flags of single commands: `--faults 100` is short for drill.faults=100, and `--dry-run` a switch of the command."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from titans_launch.names import quote

_PLAIN = re.compile(r"[\w./:-]+")
_FOLDER = {"--step": "inspect.step", "--path": "export.path"}

KEYS = {
    "evaluate": {"--follow": "name"},
    "checkpoint verify": {"--step": "inspect.step"},
    "checkpoint diff": {"--to-step": "inspect.to_step", **_FOLDER},
    "checkpoint export": {"--format": "export.format", **_FOLDER},
    "checkpoint import": {"--format": "export.format", "--path": "export.path"},
    "checkpoint convert": {"--format": "export.format", **_FOLDER},
    "submit": {"--command": "submit.command", "--chain": "submit.chain"},
    "plan": {"--search": "plan.search", "--gpu": "plan.gpu", "--picture": "plan.picture"},
    "drill": {"--faults": "drill.faults", "--seed": "drill.seed", "--hours": "drill.hours"},
}
"""Command -> flag -> the key that the value after the flag is for."""

NAMED = ("status", "logs", "cancel", "requeue")
"""Commands that take the name of a run as a word of its own: `status mine` is short for `status name=mine`."""

_HYDRAS = ("--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp")
"""Flags of Hydra that a value follows."""

SWITCHES = {
    "submit": {"--dry-run": "dry_run"},
    "evaluate": {"--follow": "follow"},
    "logs": {"--follow": "follow"},
    "plan": {"--json": "as_json", "--verify": "verify"},
    "checkpoint convert": {"--read": "read"},
    "checkpoint prune": {"--dry-run": "dry_run"},
    "resume": {"--explain": "explain"},
}
"""Command -> flag -> the argument of the command's `run` that it makes true; it has a value only if KEYS has it too."""


def of(command: str) -> list[str]:
    """The flags of a command."""
    return list({**KEYS.get(command, {}), **SWITCHES.get(command, {})})


def translate(command: str, arguments: list[str]) -> tuple[list[str], dict[str, bool]]:
    """The arguments as Hydra knows them, and the switches among them.

    Raises ValueError, one sentence, for a flag that lacks its value and a switch that has one.

    >>> translate("drill", ["--faults", "100", "--seed=1"])
    (['drill.faults=100', 'drill.seed=1'], {})
    >>> translate("evaluate", ["--follow", "mine"])
    (['name=mine'], {'follow': True})
    """
    keys, switches = KEYS.get(command, {}), SWITCHES.get(command, {})
    found: list[str] = []
    given: dict[str, bool] = {}
    rest = iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if flag in switches and (flag in keys or not equals):
            given[switches[flag]] = True
        if flag in keys:
            value = value if equals else _value(flag, keys[flag], rest)
            found.append(f"{keys[flag]}={value if _PLAIN.fullmatch(value) else quote(value)}")
        elif flag in switches:
            if equals:
                raise ValueError(f"{argument} has a value, but {flag} takes none; write {flag} alone")
        elif flag in _HYDRAS and not equals:
            found += [argument, *itertools.islice(rest, 1)]
        elif command in NAMED and "=" not in argument and not argument.startswith("-"):
            found.append(f"name={quote(argument)}")
        else:
            found.append(argument)
    return found, given


def _value(flag: str, key: str, rest: Iterator[str]) -> str:
    value = next(rest, None)
    if value is None or value.startswith("--"):
        raise ValueError(f"{flag} has no value; write {flag} VALUE or {key}=VALUE")
    return value
