"""`titans-dist evaluate report`: the report of what is in the ledger, without measuring anything."""

from __future__ import annotations

from titans_dist.config import Config
from titans_launch.evaluate import write_report


def run(config: Config) -> None:
    """Write it and say where."""
    write_report(config)
