"""The commands of the guides to planning work as they are written, and the tables on scaling are what they make."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from titans_launch.cli import main

ROOT = Path(__file__).parents[2]
COMMANDS = re.findall(r"^    titans-dist (plan .*)$", (ROOT / "docs" / "planning.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_plan_of_the_guide_is_made(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)) == 0


def test_the_guide_shows_every_flag() -> None:
    for flag in ("--search", "--gpu", "--picture", "--verify"):
        assert any(flag in command for command in COMMANDS)


def test_the_tables_on_scaling_are_those_that_the_tool_makes() -> None:
    guide = (ROOT / "docs" / "scaling.md").read_text()
    (command,) = re.findall(r"^    (python benchmarks/scaling\.py) --write$", guide, re.MULTILINE)
    program = [sys.executable, *command.split()[1:], "--sizes", "170M"]
    made = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True).stdout
    rows = [line for line in made.splitlines() if line.startswith("| 170M |")]
    assert len(rows) == 5
    for row in rows:
        assert row in guide, "the tables are old: make them again, as the guide says"
