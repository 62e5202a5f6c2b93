"""Fixtures that call the command line in an empty folder."""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import command_line
from tests.launch.command_line import Cli


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """cli("train", "name=x", RANK="0") runs `RANK=0 titans-dist train name=x` in tmp_path."""
    return functools.partial(command_line.run, cwd=tmp_path)


@pytest.fixture
def stubbed(tmp_path: Path) -> Cli:
    """The same with a stand-in for the training loop and the evaluation; everything about processes is real."""
    return functools.partial(command_line.run, cwd=tmp_path, first=(command_line.STUB,))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder, and everything that `main` sets in its process put back afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    handler = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, handler)
