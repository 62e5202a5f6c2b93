"""What Hydra and OmegaConf say about a configuration that cannot be composed, as one sentence with the mend."""

from __future__ import annotations

import difflib
import re

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import ValidationError
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from titans_launch import keys

_KEY_ERROR = re.compile(r"Key '[^']+' not in")
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)


def sentence(error: BaseException) -> str:
    """One sentence for an exception of the composition (one of COMPOSITION_ERRORS)."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    text = "\n".join(map(str, chain))
    where = re.search(r"In '([^']+)': \w+ raised", text)
    prefix = f"in {where[1]}.yaml: " if where else ""

    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _no_such_file(error.missing_cfg_file, list(error.options or ()))
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override} cannot be read; write KEY=VALUE, and a value with special characters in quotes, "
            "such as \"KEY='a, b'\""
        )
    if match := re.search(r"Ambiguous value for argument '(\S+?)=", text):
        return f"{match[1]} got several values; add -m to run one job for each, or write [a,b] for a list"
    # The override's own key is longer than OmegaConf's when a whole section is unknown.
    if match := re.search(r"Could not override '([^'@]+)'", text):
        return keys.unknown(match[1])
    key = next((name for item in chain if (name := _full_key(item))), None)
    if key is None:
        return prefix + _first_words(text)
    if any(isinstance(item, ConfigKeyError | ConfigAttributeError) for item in chain) or _KEY_ERROR.search(text):
        return prefix + keys.unknown(key)
    if any(isinstance(item, MissingMandatoryValue) for item in chain) or "missing mandatory value" in text.lower():
        return f"{key} has no value and no default; add {key}=VALUE"
    if any(type(item) is ValidationError for item in chain) or "ValidationError raised" in text:
        return f"{prefix}{_given(key, text)} is not {keys.expected(key)}"
    return prefix + _first_words(text)


def _no_such_file(file: str, options: list[str]) -> str:
    group, _, option = file.rpartition("/")
    if not group:
        return f"there is no configuration {file}.yaml; leave out --config-name to use config.yaml"
    if not options and (folder := keys.CONFIGS / group).is_dir():
        options = sorted(path.stem for path in folder.glob("*.yaml"))
    if not options:
        return keys.unknown(group.replace("/", "."))
    near = difflib.get_close_matches(option, options, n=1, cutoff=0.5)
    meant = f"did you mean {group}={near[0]}? There are" if near else "choose one of"
    return f"unknown option {group}={option}; {meant} {', '.join(options)}"


def _full_key(error: BaseException) -> str | None:
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return error.full_key
    match = re.search(r"full_key: (\S+)", str(error))
    return match[1] if match else None


def _given(key: str, text: str) -> str:
    if match := re.search(r"Error merging override (\S.*)", text):
        return match[1].lstrip("+")
    match = re.search(r"Value '(.*?)' (?:of type|is not)|(?:value: |assigned: )(.*)", text)
    return f"{key}={match[1] or match[2]}" if match else f"{key}=null"


def _first_words(text: str) -> str:
    """The message without the parts that follow for developers."""
    kept = []
    for line in text.splitlines():
        if re.match(r"\s*(full_key|object_type|reference_type|Config search path|See https)", line):
            break
        if line.strip():
            kept.append(line.strip())
    return "; ".join(kept) or "the configuration cannot be composed"
