"""`titans-dist prepare` on a real corpus: progress, a table, and nothing done twice."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.launch import command_line
from tests.launch.command_line import Cli, Result
from titans_data import load_card
from titans_dist.config import DataConfig
from titans_launch import prepare

OVERRIDES = ["data=jsonl", "data.source=corpus.jsonl", "data.tokenizer=bytes", "data.path=out"]
OVERRIDES += ["data.validation_fraction=0.3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small corpus; the first test prepares it, the others find it prepared."""
    lines = [f'{{"text": "document number {number}"}}' for number in range(40)]
    folder = tmp_path_factory.mktemp("prepare")
    (folder / "corpus.jsonl").write_text("\n".join([*lines, '{"text": "  "}', "no json"]) + "\n")
    return folder


@pytest.fixture(scope="module")
def first(folder: Path) -> Result:
    return run(folder)


def run(folder: Path, *more: str) -> Result:
    return command_line.run("prepare", *OVERRIDES, *more, cwd=folder)


def test_the_table_says_what_the_card_says(first: Result, folder: Path) -> None:
    assert first.returncode == 0, first.stderr
    card = load_card(folder / "out")
    cells = dict(re.findall(r"│ (.+?) +│ (.+?) +│", first.stdout))
    for name, split in card.splits.items():
        assert cells[name] == f"{split.documents:,} documents, {split.tokens:,} tokens, {split.bytes:,} bytes"
    assert cells["empty documents"] == "1 dropped"
    assert cells["undecodable bytes"] == "replaced in 0 documents"
    assert cells["garbled lines"].startswith("1 skipped, the first is ")
    assert cells["tokenizer"].startswith("bytes, ")
    assert re.fullmatch(r"[\d,]+ tokens/s, \d+\.\d s", cells["speed"])
    assert cells["where"] == "out"
    assert sorted(path.name for path in folder.iterdir()) == ["corpus.jsonl", "out"]


def test_progress_is_plain_lines_when_nobody_watches(first: Result) -> None:
    lines = [line for line in first.stdout.splitlines() if line.startswith("prepare | ")]
    assert [line.split(" | ")[1] for line in lines] == ["tokenize", "digest"]


def test_a_prepared_dataset_is_left_as_it_is(first: Result, folder: Path) -> None:
    before = (folder / "out" / "dataset.json").stat().st_mtime_ns
    again = run(folder)
    assert again.returncode == 0
    assert "prepared earlier" in again.stdout
    assert (folder / "out" / "dataset.json").stat().st_mtime_ns == before


def test_other_options_are_refused_instead_of_mixed(first: Result, folder: Path) -> None:
    other = run(folder, "data.validation_fraction=0.2")
    assert other.returncode == 4
    assert "validation_fraction=0.3 there, 0.2 here" in other.stderr


def test_ready_made_tokens_need_no_preparing(cli: Cli) -> None:
    run = cli("prepare", "data=synthetic")
    assert run.returncode == 2
    assert run.stderr.startswith("titans-dist: data=synthetic needs no preparing")


def test_every_option_of_the_configuration_reaches_the_dataset() -> None:
    data = DataConfig(
        format="parquet",
        source="s",
        text_column="c",
        path="p",
        tokenizer="t",
        vocab_size=999,
        validation_fraction=0.25,
    )
    options = prepare.options(data)
    for name in ("format", "source", "text_column", "tokenizer", "vocab_size", "validation_fraction"):
        assert getattr(options, name) == getattr(data, name)
