"""`titans-dist conformance`: is a model causal, and does it leak nothing, learn everywhere and go on where it was?"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from rich.table import Table

from titans_dist.config import Config, ConfigError
from titans_launch import tables


def run(config: Config) -> int:
    """Check the configuration's model, or the target, and print the table; 1 if a property does not hold."""
    from titans_dist.conformance import check
    from titans_dist.model import build_model

    settings = config.conformance
    target: Any
    if settings.target is None:
        if settings.vocab_size > config.model.vocab_size:
            raise ConfigError(
                f"conformance.vocab_size={settings.vocab_size} is more than model.vocab_size="
                f"{config.model.vocab_size}; use that or less"
            )
        name, target = config.model.variant, build_model(config.model, config.training.seed)
    else:
        name, target = settings.target, made(settings.target)
    verdicts = check(
        target,
        vocab_size=settings.vocab_size,
        length=settings.length,
        batch=settings.batch,
        probes=settings.probes,
    )
    title = f"{name}: {settings.batch} sequences of {settings.length} tokens"
    table = Table(title=title, title_justify="left")
    table.add_column("property", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("evidence", overflow="fold")
    for verdict in verdicts:
        table.add_row(verdict.name, verdict.word, verdict.evidence)
    tables.console().print(table)
    return int(any(verdict.passed is False for verdict in verdicts))


def made(target: str) -> Any:
    """What the function of `MODULE:FUNCTION` returns; the current folder is on the import path."""
    from titans_dist.conformance.subject import said

    module_name, _, function = target.partition(":")
    if not module_name or not function:
        raise ConfigError(f"conformance.target={target} names no function; write MODULE:FUNCTION, such as mine:make")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(f"conformance.target={target}: {module_name} cannot be imported: {said(error)}") from error
    make = getattr(module, function, None)
    if not callable(make):
        raise ConfigError(f"conformance.target={target}: {module_name} has no function {function}")
    try:
        return make()
    except Exception as error:
        raise ConfigError(f"conformance.target={target}: {function}() failed: {said(error)}") from error
