"""`titans-dist prepare` on a real corpus: progress, a table, and nothing done twice."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from tests.launch import command_line
from tests.launch.command_line import Cli, Result
from titans_data import PrepareOptions, load_card
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
    assert cells["empty documents"].startswith("1 dropped, the first is ")
    assert cells["undecodable bytes"] == "replaced in 0 documents"
    assert cells["garbled lines"].startswith("1 skipped, the first is ")
    assert cells["tokenizer"].startswith("bytes, ")
    assert re.fullmatch(r"[\d,]+ tokens/s, \d+\.\d s", cells["speed"])
    assert cells["where"] == "out"
    assert sorted(path.name for path in folder.iterdir()) == ["corpus.jsonl", "out"]


def test_progress_is_plain_lines_when_nobody_watches(first: Result) -> None:
    lines = [line for line in first.stdout.splitlines() if line.startswith("prepare | ")]
    assert [line.split(" | ")[1] for line in lines] == ["tokenize", "assemble"]


def test_progress_says_how_fast_and_how_long_yet(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    meter = prepare.Meter(lambda: now)
    meter("tokenize", 30_000_000, 100_000_000)  # what an earlier prepare did says nothing of the pace
    now = 9.5  # nor does the time until the first sign of life
    meter("tokenize", 31_000_000, 100_000_000)
    now = 10.5
    meter("tokenize", 33_000_000, 100_000_000)
    now = 12.0
    meter("tokenize", 34_000_000, 100_000_000)
    now = 4009.5
    meter("tokenize", 71_000_000, 100_000_000)
    assert capsys.readouterr().out.splitlines() == [
        "prepare | tokenize | 30%",
        "prepare | tokenize | 33% | 2.0 MB/s | 0:34 left",
        "prepare | tokenize | 71% | 0.0 MB/s | 48:20 left",
    ]


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
        deduplicate=True,
        min_characters=3,
        max_characters=4000,
        max_compression_ratio=9.5,
        min_compression_ratio=1.25,
        max_repeated_lines=0.5,
    )
    options = prepare.options(data)
    plain = PrepareOptions(format="text", source="x")
    shared = {field.name for field in fields(PrepareOptions)} & {field.name for field in fields(DataConfig)}
    assert {field.name for field in fields(PrepareOptions)} - shared == {
        "tokenizer_sample_bytes",
        "page_tokens",
        "shard_bytes",
    }
    for name in shared:
        assert getattr(options, name) == getattr(data, name) != getattr(plain, name)
