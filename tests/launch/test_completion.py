"""The Tab key, asked the way bash asks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.command_line import environment

# What bash does on Tab: it sets the COMP_ variables and calls the function that `complete` named.
ASK = r"""
eval "$(titans-dist -sc install=bash)"
complete -p titans-dist | grep -q hydra_bash_completion || exit 9
while IFS= read -r COMP_LINE; do
    COMP_POINT=${#COMP_LINE}
    COMP_WORDS=($COMP_LINE); COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
    [[ "$COMP_LINE" == *" " ]] && COMP_CWORD=$(( COMP_CWORD + 1 ))
    COMPREPLY=(); hydra_bash_completion; echo "${COMPREPLY[*]}"
done
"""

EXPECTED = {
    "titans-dist ": "quickstart prepare data plan train resume evaluate submit status logs cancel requeue "
    "checkpoint conformance parallel-check doctor drill info",
    "titans-dist ev": "evaluate",
    "titans-dist evaluate ": "ls report",
    "titans-dist evaluate l": "ls",
    "titans-dist evaluate suite=ru": "suite=ruler",
    "titans-dist evaluate ls suite=ru": "suite=ruler",
    "titans-dist train model=1": "model=170m model=1b3",
    "titans-dist train model=3m training.st": "training.steps=",
    "titans-dist train variant=ma": "variant=mac variant=mag variant=mal variant=mamba2",
    "titans-dist prepare data=std": "data=stdlib data=stdlib_bytes",
    "titans-dist train experiment=q": "experiment=quickstart",
    "titans-dist da": "data",
    "titans-dist data ": "ls show verify stats plan",
    "titans-dist data  s": "show stats",
    "titans-dist data show data=std": "data=stdlib data=stdlib_bytes",
    "titans-dist data plan inspect.to": "inspect.to_step=",
    "titans-dist drill --": "--faults --seed --hours",
    "titans-dist resume --e": "--explain",
    "titans-dist resume --explain name=x model=1": "model=170m model=1b3",
    "titans-dist checkpoint diff --": "--to-step --step --path",
    "titans-dist checkpoint diff --step": "--step",
    "titans-dist checkpoint diff --path b": "bin",
    "titans-dist checkpoint diff --step 4 --step=4 data=std": "data=stdlib data=stdlib_bytes",
    "titans-dist submit --d": "--dry-run",
    "titans-dist status ": "mine",
    "titans-dist logs --follow m": "mine",
    "titans-dist bogus mod": "",
    "titans-dist data bogus mod": "",
}


@pytest.fixture
def bin_folder(tmp_path: Path) -> str:
    script = tmp_path / "bin" / "titans-dist"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m titans_launch "$@"\n')
    script.chmod(0o755)
    return str(script.parent)


def test_bash_completes_commands_groups_and_keys(bin_folder: str, tmp_path: Path) -> None:
    submission = tmp_path / "runs" / "mine" / "submit" / "submission.json"
    submission.parent.mkdir(parents=True)
    submission.touch()
    variables = environment()
    variables["PATH"] = f"{bin_folder}:{variables['PATH']}"
    lines = "".join(f"{line}\n" for line in EXPECTED)
    run = subprocess.run(
        ["bash", "-c", ASK], input=lines, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert dict(zip(EXPECTED, run.stdout.splitlines(), strict=True)) == EXPECTED
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "runs"]


def test_commands_complete_without_loading_hydra(tmp_path: Path) -> None:
    program = (
        "import sys; from titans_launch.cli import main; main(['-sc', 'query=bash']); print('hydra' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(COMP_LINE="titans-dist qu", COMP_POINT="14"),
        capture_output=True,
        text=True,
    )
    assert run.stdout.splitlines() == ["quickstart", "False"]
