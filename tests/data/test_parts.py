"""Cutting a corpus: every line, row and file is in exactly one part, and most parts survive a change of the corpus."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import tempfile
from itertools import pairwise
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from titans_data import DataError
from titans_data.corpus import lines, read_corpus, read_part
from titans_data.parts import LARGEST_PART, SMALLEST_PART, Part, SourceFile, cut, cut_files, part_size
from titans_data.tally import Tally, total

MIB = 1 << 20


def sized(name: str, size: int) -> SourceFile:
    return SourceFile(f"/corpus/{name}", name, name, size, 0)


def texts_of(format: str, parts: list[Part]) -> list[str]:
    return [item.text for part in parts for item in read_part(format, part, "text", Tally())]


@pytest.mark.parametrize(
    ("total_bytes", "part_bytes"),
    [
        (0, SMALLEST_PART),
        (64 * MIB, SMALLEST_PART),
        (128 * MIB - 1, SMALLEST_PART),
        (128 * MIB, 2 * MIB),
        (10**13, LARGEST_PART),
    ],
)
def test_a_part_is_a_power_of_two_near_a_64th_of_the_corpus(total_bytes: int, part_bytes: int) -> None:
    assert part_size(total_bytes) == part_bytes


@settings(max_examples=200, deadline=None)
@given(
    content=st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")), max_size=30),
    ends=st.booleans(),
    cuts=st.lists(st.integers(0, 400), max_size=6),
)
def test_byte_ranges_give_every_line_exactly_once(content: list[bytes], ends: bool, cuts: list[int]) -> None:
    data = b"\n".join(content) + (b"\n" if ends else b"")
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_bytes(data)
        whole = [line for _, _, line in lines(path, "a")]
        pieces = [list(lines(path, "a", start, stop)) for start, stop in pairwise(edges)]
    assert b"".join(whole) == data
    assert [line for piece in pieces for _, _, line in piece] == whole
    assert all([number for number, _, _ in piece] == list(range(1, len(piece) + 1)) for piece in pieces)


def test_a_large_jsonl_file_is_cut_and_its_lines_keep_their_numbers(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    source = random.Random(3)
    with file.open("w") as out:
        for number in range(9000):
            text = "" if number == 8000 else "x" * source.randrange(1, 800)
            out.write("garbled\n" if number in (100, 4000, 8990) else json.dumps({"text": text}) + "\n")
    parts = cut("jsonl", str(file), "text")
    assert len(parts) == 3
    assert [part.goes_on for part in parts] == [False, True, True]
    assert sum(part.size_bytes for part in parts) == file.stat().st_size
    tallies = [Tally() for _ in parts]
    for part, tally in zip(parts, tallies, strict=True):
        list(read_part("jsonl", part, "text", tally))
    counts = total((part.goes_on, tally) for part, tally in zip(parts, tallies, strict=True))
    assert counts.garbled == [f"{file}:{line}" for line in (101, 4001, 8991)]
    assert counts.first_empty == f"{file}:8001"


def test_a_line_longer_than_a_part_belongs_to_the_part_where_it_starts(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "y" * (5 * MIB)}) + "\n" + '{"text": "short"}\n')
    parts = cut("jsonl", str(file), "text")
    assert len(parts) == 5
    assert [[len(text) for text in texts_of("jsonl", [part])] for part in parts] == [[5 * MIB], [], [], [], [5]]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.jsonl.zst"])
def test_text_and_compressed_files_are_not_cut(name: str) -> None:
    format = "text" if name.endswith("txt") else "jsonl"
    assert [part.stop for part in cut_files(format, [sized(name, 100 * MIB)], MIB)] == [None]


def test_small_files_are_grouped_into_parts_of_about_the_wanted_size() -> None:
    source = random.Random(1)
    files = [sized(f"{number:05}", source.randrange(100_000)) for number in range(3000)]
    parts = list(cut_files("text", files, MIB))
    assert [file for part in parts for file in part.files] == files
    assert all(part.size_bytes <= 2 * MIB + 100_000 for part in parts)
    mean = sum(part.size_bytes for part in parts) / len(parts)
    assert 0.6 * MIB < mean < 1.4 * MIB


def test_many_empty_files_are_not_one_part() -> None:
    parts = list(cut_files("text", [sized(f"{number:06}", 0) for number in range(50_000)], MIB))
    assert len(parts) > 5


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), change=st.sampled_from(["remove", "add", "grow", "large"]))
def test_one_changed_file_moves_few_parts(seed: int, change: str) -> None:
    source = random.Random(seed)
    files = [sized(f"{number:05}", source.randrange(100_000)) for number in range(1000)]
    before = set(cut_files("text", files, MIB))
    where = source.randrange(1000)
    if change == "remove":
        del files[where]
    elif change == "add":
        files.insert(where, sized(f"{where:05}-new", source.randrange(100_000)))
    else:
        files[where] = dataclasses.replace(files[where], size_bytes=5 * MIB if change == "large" else 100_000)
    # A seam that moved is soon at its old place again: after one part mostly, seldom after several.
    assert len(before - set(cut_files("text", files, MIB))) <= 10


def test_parquet_row_groups_are_spread_over_parts_in_order(tmp_path: Path) -> None:
    texts = [os.urandom(300).hex() for _ in range(7000)]
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": texts, "id": range(7000)}), file, row_group_size=500)
    parts = cut("parquet", str(file), "text")
    assert len(parts) >= 2
    assert texts_of("parquet", parts) == texts
    last = list(read_part("parquet", parts[-1], "text", Tally()))
    assert str(last[-1].origin) == f"{file}[6999]"
    assert last[-1].position == parts[-1].size_bytes
    assert sum(part.size_bytes for part in parts) == file.stat().st_size


def test_a_saved_dataset_is_read_in_ranges_of_rows_over_all_its_files(tmp_path: Path) -> None:
    import datasets

    texts = [os.urandom(400).hex() for _ in range(6000)]
    dataset = datasets.Dataset.from_dict({"text": texts, "id": list(range(6000))})
    dataset.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    parts = cut("huggingface", str(tmp_path / "saved"), "text")
    assert len(parts) == 4
    assert texts_of("huggingface", parts) == texts
    documents = [item for part in parts for item in read_part("huggingface", part, "text", Tally())]
    assert str(documents[3500].origin) == f"{tmp_path / 'saved'}[3500]"


def test_a_folder_of_data_files_is_a_dataset_for_the_hugging_face_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "data" / "train.parquet")
    found = [item.text for item in read_corpus("huggingface", str(tmp_path / "data"), "text", Tally())]
    assert found == ["one", "two"]


def test_a_damaged_large_parquet_file_is_named_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + os.urandom(2 * MIB))
    with pytest.raises(DataError, match=r"a\.parquet is not a readable Parquet file"):
        cut("parquet", str(tmp_path), "text")
