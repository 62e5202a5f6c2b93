"""`titans-dist info` answers without building or training anything."""

from __future__ import annotations

import platform
import re
from importlib import metadata
from pathlib import Path

import pytest

from tests.launch.command_line import Cli
from titans_launch.cli import main


def test_versions_devices_layout_and_parameters(cli: Cli, tmp_path: Path) -> None:
    run = cli("info", "parallel.data=3", "training.global_batch_size=48")
    assert run.returncode == 0, run.stderr
    cells = dict(re.findall(r"│ (\S+) +│ (.+?) +│", run.stdout))
    assert cells["python"] == platform.python_version()
    assert cells["torch"] == metadata.version("torch")
    assert cells["hydra-core"] == metadata.version("hydra-core")
    assert "cores" in cells["cpu"]
    assert cells["processes"] == "6 = tensor 2 x data 3"
    assert cells["batch"] == "48 sequences = 12,288 tokens, 2 micro-batch(es) per copy"
    assert not list(tmp_path.iterdir())

    rows = re.findall(r"│ (\S+) +│[^│]*│ +([\d,]+) │", run.stdout)
    counts = [int(count.replace(",", "")) for _, count in rows]
    assert rows[-1][0] == "total"
    assert len(rows) > 10
    assert counts[-1] == sum(counts[:-1])


def test_the_model_in_words_and_its_total(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "experiment=titans_340m", "variant=lmm", "memory=moneta"]) == 0
    printed = capsys.readouterr().out
    cells = dict(re.findall(r"│ (\S+) +│ (.+?) +│", printed))
    assert cells["variant"] == "lmm"
    assert cells["heads"] == "16 of 64"
    assert cells["memory"] == "moneta: depth 2, lp loss, lq_paper retention, chunks of 64"
    count, share = re.findall(r"^([\d,]+) \(([+-][\d.]+)% of model.parameters\)$", cells["parameters"])[0]
    assert abs(float(share)) < 3
    assert re.findall(r"│ total +│[^│]*│ +([\d,]+) │", printed) == [count]


def test_a_model_without_memory_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "variant=swa"]) == 0
    assert re.search(r"│ memory +│ none +│", capsys.readouterr().out)
