"""Small tables of names and values for the end of a command."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table


def show(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print a titled table of two columns."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    console().print(table)


def console() -> Console:
    """A console for standard output that takes text as it is, and is wide where it is not a terminal."""
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 120)


def place(path: Path | str) -> str:
    """`path` as a person would type it here: relative where it lies below the current folder."""
    path = Path.cwd() / path
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
