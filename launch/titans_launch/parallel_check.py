"""`titans-dist parallel-check`: does the configured layout compute what one process computes?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from titans_dist.config import Config
from titans_dist.config.layout import describe_layout, model_size
from titans_launch import local, tables, worker

if TYPE_CHECKING:
    from titans_dist.parallel.check import CheckResult, Comparison

SHOWN = 8
"""Gradients in the table, those that differ most first."""


def run(config: Config) -> int:
    """Check, as a worker or as the launcher of workers on this machine; 1 if something differs."""
    if not worker.is_worker():
        return local.launch("parallel-check", config)
    worker.enter(Path(config.run_dir), "parallel-check")
    from titans_dist.parallel.check import check_layout

    result = check_layout(config)
    if result is None:
        return 0
    show(config, result)
    return 0 if result.passed else 1


def show(config: Config, result: CheckResult) -> None:
    """Print the comparison, what was sent, and the verdict."""
    from titans_dist.parallel.communication import COLUMNS

    copies = result.world // model_size(config.parallel)
    layout = f"{config.model.variant} on {result.world} processes = {describe_layout(config.parallel, copies)}"
    numbers = [one for one in result.comparisons if one.layout is not None]
    gradients = sorted((one for one in result.comparisons if one.layout is None), key=lambda one: -one.difference)
    table = Table(title=layout, title_justify="left")
    table.add_column("", no_wrap=True, overflow="fold")
    for name in ("layout", "one process", "difference", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for one in (*numbers, *gradients[:SHOWN]):
        table.add_row(one.what, _number(one.layout), _number(one.reference), f"{one.difference:.1e}", _word(one))
    tables.console().print(table)
    if len(gradients) > SHOWN:
        tables.console().print(f"{len(gradients) - SHOWN} more kinds of parameters differ less")
    if result.bubble is not None:
        tables.console().print(
            f"each process of the ring waits {result.bubble:.1%} of its turns; "
            f"by the formula {result.expected_bubble:.1%}"
        )
    sent = Table(title="sent by rank 0 in one step", title_justify="left")
    for column in COLUMNS:
        sent.add_column(column, justify="left" if column == "kind" else "right", no_wrap=True)
    for row in result.sent:
        sent.add_row(*row.texts())
    tables.console().print(sent)
    wrong = [one.what for one in result.comparisons if not one.agrees]
    verdict = f"DIFFERS from one process: {', '.join(wrong)}" if wrong else "the layout equals one process"
    tables.console().print(verdict)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def _word(one: Comparison) -> str:
    return "ok" if one.agrees else "WRONG"
