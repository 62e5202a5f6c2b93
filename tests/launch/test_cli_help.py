"""The command line teaches by example, at once, and knows what was meant."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import titans_dist
from tests.launch.command_line import Cli, environment
from titans_launch import help

HEAVY = ("hydra", "omegaconf", "torch", "rich", "numpy", "psutil", "streaming", "wandb")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["data", "show", "-h"], ["--version"], ["trian"]]
)
def test_static_answers_import_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    program = (
        "import json, sys; from titans_launch.cli import main; code = main(sys.argv[1:]);"
        f"print(json.dumps([name for name in {HEAVY} if name in sys.modules]), file=sys.stderr)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert json.loads(run.stderr.splitlines()[-1]) == []


@pytest.mark.parametrize("command", help.COMMANDS)
def test_each_command_shows_examples_exit_codes_and_where_results_lie(command: str, cli: Cli) -> None:
    run = cli(*command.split(), "--help")
    assert run.returncode == 0
    examples = [line for line in run.stdout.splitlines() if line.startswith("  titans-dist")]
    assert 2 <= len(examples) <= 4
    assert "Results: " in run.stdout or command == "info"
    assert "3 interrupted and saved" in run.stdout


@pytest.mark.parametrize("command", help.COMMANDS)
def test_the_examples_in_the_help_compose(command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from titans_launch.cli import main

    examples = [line for line in help.of(command).splitlines() if line.startswith("  titans-dist")]
    for example in examples:
        words = shlex.split(example)[1:]
        is_sweep = "-m" in words
        words = [word for word in words if word != "-m" and "--cfg" not in word and word != "job"]
        single = [word.split(",")[0] if is_sweep else word for word in words]
        assert main([*single, "--cfg", "job"]) == 0, example
    assert not list(here.iterdir())


def test_version_is_the_library_s(cli: Cli) -> None:
    assert cli("--version").stdout == f"titans-dist {titans_dist.__version__}\n"


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("trian", "titans-dist: unknown command trian; did you mean train?\n"),
        ("eval", "titans-dist: unknown command eval; did you mean evaluate?\n"),
        ("model=3m", "titans-dist: model=3m comes before the command; write titans-dist COMMAND model=3m"),
        ("xyzzy", "titans-dist: unknown command xyzzy; choose one of quickstart, prepare"),
        ("verify", "titans-dist: unknown command verify; did you mean data verify?\n"),
        ("data shw", "titans-dist: unknown command data shw; did you mean data show?\n"),
        ("data model=3m", "titans-dist: model=3m comes before the command; write titans-dist data COMMAND model=3m"),
        ("evaluate lss", "titans-dist: unknown command evaluate lss; did you mean evaluate ls?\n"),
        ("data xyzzy", "titans-dist: unknown command data xyzzy; choose one of data ls, data show"),
    ],
)
def test_an_unknown_command_is_one_sentence_and_exit_code_2(word: str, sentence: str, cli: Cli) -> None:
    run = cli(*word.split())
    assert run.returncode == 2
    assert run.stderr.startswith(sentence)
    assert run.stderr.count("\n") == 1
    assert run.stdout == ""


def test_the_first_word_of_two_shows_what_may_follow(capsys: pytest.CaptureFixture[str]) -> None:
    from titans_launch.cli import main

    assert main(["data", "--help"]) == 0
    overview = capsys.readouterr().out
    assert [line.split()[:2] for line in overview.splitlines() if line.startswith("  data ")] == [
        name.split() for name in help.COMMANDS if name.startswith("data ")
    ]
    assert main(["data"]) == 2
    assert capsys.readouterr().err == overview


@pytest.mark.parametrize(
    ("line", "command"),
    [("evaluate", "evaluate"), ("evaluate name=mine", "evaluate"), ("evaluate ls name=mine", "evaluate ls")],
)
def test_a_command_may_be_the_first_word_of_others_too(line: str, command: str) -> None:
    assert help.split(line.split())[0] == command


def test_no_command_shows_the_overview_and_is_a_mistake(cli: Cli) -> None:
    run = cli()
    assert run.returncode == 2
    assert run.stderr.startswith("titans-dist COMMAND")
