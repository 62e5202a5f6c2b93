"""A configuration that cannot work is one sentence on stderr and exit code 2; nothing is left behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.launch.command_line import Cli
from titans_launch.cli import main


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ("model.hidden=64", "unknown key model.hidden; did you mean model.hidden_size?"),
        ("memory.chunk_size=32", "unknown key memory.chunk_size; did you mean model.memory.chunk_size?"),
        ("chunk_size=32", "unknown key chunk_size; did you mean model.memory.chunk_size?"),
        ("trainig.steps=3", "unknown key trainig.steps; did you mean training.steps?"),
        ("modle=3m", "unknown key modle; did you mean model?"),
        ("+model.hidden=64", "unknown key model.hidden; did you mean model.hidden_size?"),
        ("+x=3", "unknown key x; titans-dist train --cfg job prints every key"),
        ("data.sources={web:x}", "data.sources has keys of your own; add each by itself, as +data.sources.NAME=VALUE"),
        ("data.sources.web=x", "data.sources has keys of your own; add each by itself"),
        ("data=mixture", "data=mixture has no datasets; add +data.sources.NAME=FOLDER for each"),
        ("model=3n", "unknown option model=3n; did you mean model=3m? There are 170m, 1b3"),
        ("variant=mag2", "unknown option variant=mag2; did you mean variant=mag? There are deltanet"),
        ("memory=monet", "unknown option memory=monet; did you mean memory=moneta? There are deltanet"),
        ("tracking=tensorboard", "unknown option tracking=tensorboard; choose one of console, wandb"),
        ("model.hidden_size=abc", "model.hidden_size=abc is not a whole number"),
        ("training.steps=1e3", "training.steps=1e3 is not a whole number"),
        ("parallel.sequence=maybe", "parallel.sequence=maybe is not true or false"),
        ("parallel.data=two", "parallel.data=two is not a whole number or null"),
        ("model.hidden_size=null", "model.hidden_size=null is not a whole number"),
        ("model.memory=4", "model.memory=4 is not a section; set the keys below it, such as model.memory.preset"),
        ("training.steps=20,30", "training.steps got several values; add -m"),
        ("model.hidden_size", "model.hidden_size cannot be read; write KEY=VALUE"),
        ("data=tokens", "data.path has no value and no default; add data.path=VALUE"),
        ("training.precision=fp8", "training.precision=fp8 is unknown; choose one of float32, bfloat16"),
        ("--config-dir missing", "Additional config directory"),
        ("--config-name other", "there is no configuration other.yaml"),
        ("--confg job", "unrecognized arguments: --confg; titans-dist COMMAND --help shows examples"),
        ("data.source=${nope}", "Interpolation key 'nope' not found"),
    ],
)
def test_the_sentence_names_the_key_and_the_mend(
    overrides: str, sentence: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", *overrides.split()]) == 2
    printed = capfd.readouterr()
    assert printed.err.startswith(f"titans-dist: {sentence}"), printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not list(here.iterdir())


def test_an_unknown_key_in_a_file_of_the_user_names_the_file(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "mine" / "model").mkdir(parents=True)
    (here / "mine" / "model" / "tiny.yaml").write_text("hidden: 64\n")
    assert main(["info", "--config-dir", "mine", "model=tiny"]) == 2
    error = capfd.readouterr().err
    assert "tiny.yaml" in error or "config.yaml" in error
    assert "unknown key model.hidden; did you mean model.hidden_size?" in error
    assert error.count("\n") == 1


def test_a_process_of_its_own_exits_with_the_code(cli: Cli, tmp_path: Path) -> None:
    run = cli("train", "model.hidden=64")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("titans-dist: unknown key model.hidden;")
    assert not list(tmp_path.iterdir())


def test_only_the_first_rank_of_a_job_complains_about_the_configuration(cli: Cli) -> None:
    first, second = (cli("train", "model.hidden=64", RANK=rank, WORLD_SIZE="2") for rank in "01")
    assert first.returncode == second.returncode == 2
    assert "unknown key" in first.stderr
    assert second.stderr == ""


def test_srun_without_a_master_address_is_refused_and_not_mistaken_for_many_launchers(cli: Cli) -> None:
    run = cli("train", "data=synthetic", SLURM_PROCID="0", SLURM_NTASKS="4", SLURM_LOCALID="0")
    assert run.returncode == 2
    assert run.stderr.startswith("titans-dist: srun started 4 tasks but MASTER_ADDR is not set")


def test_a_bug_keeps_its_traceback(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from titans_launch import info

    monkeypatch.setattr(info, "layout", lambda config: 1 / 0)
    assert main(["info"]) == 1
    error = capfd.readouterr().err
    assert error.startswith("Traceback (most recent call last)")
    assert error.rstrip().endswith("ZeroDivisionError: division by zero")


def test_an_interrupt_is_exit_code_3_without_a_traceback(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from titans_launch import info

    monkeypatch.setattr(info, "run", lambda config: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["info"]) == 3
    assert capfd.readouterr().err == "titans-dist: interrupted\n"


def test_refused_data_is_exit_code_4(cli: Cli) -> None:
    run = cli("prepare", "data=text", "data.source=nowhere.txt")
    assert run.returncode == 4
    assert run.stderr.startswith("titans-dist: ")
    assert run.stderr.count("\n") == 1


def test_evaluating_a_run_that_never_was_is_exit_code_4(cli: Cli, tmp_path: Path) -> None:
    run = cli("evaluate", "name=never")
    assert run.returncode == 4
    assert run.stderr.startswith("titans-dist: runs/never has no checkpoint to evaluate")
    assert not list(tmp_path.iterdir())
