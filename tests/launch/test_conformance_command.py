"""`titans-dist conformance`: a table and an exit code, for our models and for anybody's."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.conformance import models
from tests.launch.command_line import Cli
from titans_launch.cli import main

SMALL = (
    "model.num_layers=1",
    "model.hidden_size=16",
    "model.num_heads=2",
    "model.window=6",
    "model.persistent_tokens=2",
    "model.memory.chunk_size=4",
    "model.memory.expansion=1",
    "conformance.length=24",
    "conformance.probes=4",
)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A module of the user's in the current folder: some models, and functions that make them."""
    shutil.copy(models.__file__, tmp_path / "theirs.py")
    with (tmp_path / "theirs.py").open("a") as file:
        file.write("\n\ndef broken():\n    raise KeyError('no weights')\n")
    return tmp_path


def rows(text: str) -> dict[str, tuple[str, str]]:
    """Property -> verdict and evidence."""
    cells = re.findall(r"^│ (.+?) +│ (pass|FAIL|not offered) +│ (.+?) +│$", text, re.MULTILINE)
    return {name: (verdict, evidence) for name, verdict, evidence in cells}


def test_a_variant_of_ours_passes(cli: Cli, tmp_path: Path) -> None:
    run = cli("conformance", "-m", "variant=lmm,swa", *SMALL)
    assert run.returncode == 0, run.stderr
    first, second = run.stdout.split("swa: ")
    assert first.startswith("lmm: 2 sequences of 24 tokens")
    assert [verdict for verdict, _ in rows(first).values()] == ["pass"] * 5
    assert [verdict for verdict, _ in rows(second).values()] == ["pass"] * 4 + ["not offered"]
    assert not list(tmp_path.iterdir())


def test_a_model_in_the_current_folder_that_leaks_is_exit_code_1(cli: Cli, target: Path) -> None:
    run = cli("conformance", "conformance.target=theirs:SeesTheNextToken", "conformance.vocab_size=32")
    assert run.returncode == 1
    assert run.stderr == ""
    found = rows(run.stdout)
    assert [verdict for verdict, _ in found.values()] == ["FAIL", "pass", "pass", "not offered", "not offered"]
    assert re.match(r"token \d+ changed output \d+ by \d\.\de-\d\d; 32 of 144 tokens", found["causality"][1])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ("conformance.target=theirs", "conformance.target=theirs names no function; write MODULE:FUNCTION"),
        ("conformance.target=nowhere:make", "conformance.target=nowhere:make: nowhere cannot be imported: ModuleNot"),
        ("conformance.target=theirs:make", "conformance.target=theirs:make: theirs has no function make"),
        (
            "conformance.target=theirs:broken",
            "conformance.target=theirs:broken: broken() failed: KeyError: 'no weights' (",
        ),
        ("conformance.target=theirs:Sound conformance.vocab_size=33", "the target failed: IndexError: "),
        ("conformance.vocab_size=5000", "conformance.vocab_size=5000 is more than model.vocab_size=4096; use that"),
        ("conformance.batch=1", "conformance.batch=1 is too small; use 2 or more"),
    ],
)
def test_what_cannot_be_checked_is_one_sentence_and_exit_code_2(
    overrides: str,
    sentence: str,
    here: Path,
    target: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.delitem(sys.modules, "theirs", raising=False)
    assert main(["conformance", *overrides.split()]) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"titans-dist: {sentence}")
    assert printed.err.count("\n") == 1
