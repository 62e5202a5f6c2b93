"""Bad input: each kind is named by file and row, and costs nothing that was good."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from titans_data import CorpusCounts, DataError, MdsSource, PrepareOptions, load_card, load_tokenizer, prepare

GOOD = ["first", "zweiter, 测试", "third"]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def prepared(format: str, source: Path, out: Path) -> tuple[list[str], CorpusCounts]:
    """The documents of the dataset that is made of a corpus, and its counts."""
    card = prepare(PrepareOptions(format, str(source), tokenizer="bytes", validation_fraction=0.0), out)
    split = MdsSource(out)
    text = load_tokenizer(out / "tokenizer").decode(split.read(0, split.num_tokens)[0])
    documents = text.split("<|endofdocument|>")[:-1]
    assert card.counts.documents == len(documents)
    return documents, card.counts


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two good JSONL files with room for a bad one between them."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(jsonl(GOOD))
    (folder / "c.jsonl").write_bytes(jsonl(GOOD))
    return folder


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b'{"text": "cut of', id="truncated"),
        pytest.param(b"\x00\x01\x02 nonsense", id="binary"),
        pytest.param(b'["text"]', id="a list"),
        pytest.param(b'{"text": 5}', id="a number"),
        pytest.param(b'{"other": "x"}', id="another key"),
        pytest.param(b"[" * 100_000, id="endless nesting"),
    ],
)
@pytest.mark.parametrize("row", [2, 4])
def test_a_garbled_line_is_named_and_skipped(line: bytes, row: int, corpus: Path, tmp_path: Path) -> None:
    lines = jsonl(GOOD).splitlines()
    lines.insert(row - 1, line)
    (corpus / "b.jsonl").write_bytes(b"\n".join(lines))
    documents, counts = prepared("jsonl", corpus, tmp_path / "out")
    assert documents == GOOD * 3
    assert (counts.garbled_lines, counts.garbled) == (1, [f"{corpus}/b.jsonl:{row}"])


def test_the_first_few_of_many_garbled_lines_are_named(corpus: Path, tmp_path: Path) -> None:
    (corpus / "b.jsonl").write_bytes(b"nonsense\n" * 3)
    (corpus / "d.jsonl").write_bytes(b"\n" + b"nonsense\n" * 9)
    documents, counts = prepared("jsonl", corpus, tmp_path / "out")
    assert documents == GOOD * 2
    assert counts.garbled_lines == 12
    assert counts.garbled == [
        f"{corpus}/{place}" for place in ("b.jsonl:1", "b.jsonl:2", "b.jsonl:3", "d.jsonl:2", "d.jsonl:3")
    ]


def test_bad_utf8_in_a_line_is_replaced_and_named(corpus: Path, tmp_path: Path) -> None:
    (corpus / "b.jsonl").write_bytes(b'{"text": "good"}\n{"text": "caf\xe9 au lait"}\n{"text": "also"}\n')
    documents, counts = prepared("jsonl", corpus, tmp_path / "out")
    assert documents == [*GOOD, "good", "caf\ufffd au lait", "also", *GOOD]
    assert (counts.replaced_documents, counts.replaced_sequences) == (1, 1)
    assert counts.first_replaced == f"{corpus}/b.jsonl:2"


def test_bad_utf8_in_a_text_file_is_replaced_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, content in (("a", b"fine"), ("b", b"\xff\xfe bad"), ("c", b"fine too")):
        (folder / name).write_bytes(content)
    documents, counts = prepared("text", folder, tmp_path / "out")
    assert documents == ["fine", "\ufffd\ufffd bad", "fine too"]
    assert (counts.replaced_sequences, counts.first_replaced) == (2, f"{folder}/b")


def test_bad_utf8_in_a_parquet_column_is_replaced_and_named_by_row(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    values = [b"fine", b"caf\xe9", None, b"fine too"]
    parquet.write_table(pyarrow.table({"text": pyarrow.array(values, pyarrow.binary())}), file)
    documents, counts = prepared("parquet", file, tmp_path / "out")
    assert documents == ["fine", "caf\ufffd", "fine too"]
    assert (counts.first_replaced, counts.first_empty) == (f"{file}[1]", f"{file}[2]")


def test_empty_documents_are_dropped_and_the_first_is_named(corpus: Path, tmp_path: Path) -> None:
    (corpus / "b.jsonl").write_bytes(jsonl(["kept", "", " \n\t"]) + b'{"text": null}\n')
    documents, counts = prepared("jsonl", corpus, tmp_path / "out")
    assert documents == [*GOOD, "kept", *GOOD]
    assert (counts.empty, counts.first_empty) == (3, f"{corpus}/b.jsonl:2")


def test_a_file_name_that_is_not_utf8_is_no_obstacle(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, content in ((b"a\xff", "kept"), (b"b\xfe", " ")):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_text(content)
    documents, counts = prepared("text", folder, tmp_path / "out")
    assert documents == ["kept"]
    assert counts.first_empty == f"{folder}/b\\udcfe"
    assert load_card(tmp_path / "out").counts == counts


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("damage", ["truncated", "garbled"])
def test_a_damaged_compressed_file_is_named_with_the_line(
    suffix: str, damage: str, corpus: Path, tmp_path: Path
) -> None:
    content = jsonl([f"{number} " + "word " * (number % 40) for number in range(5000)])
    packed = gzip.compress(content) if suffix.endswith("gz") else pyarrow.compress(content, "zstd", asbytes=True)
    middle = len(packed) // 2
    broken = packed[:middle] if damage == "truncated" else packed[:middle] + b"\x55" * 40 + packed[middle + 40 :]
    (corpus / f"b{suffix}").write_bytes(broken)
    with pytest.raises(DataError, match=rf"b{suffix} cannot be read after line \d+ .*: repair or remove it"):
        prepared("jsonl", corpus, tmp_path / "out")
    (corpus / f"b{suffix}").write_bytes(packed)
    assert len(prepared("jsonl", corpus, tmp_path / "out")[0]) == 5000 + 2 * len(GOOD)


def test_one_parquet_file_without_the_column_is_named_with_the_columns_it_has(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    parquet.write_table(pyarrow.table({"text": GOOD}), folder / "a.parquet")
    parquet.write_table(pyarrow.table({"body": GOOD, "id": [1, 2, 3]}), folder / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet has no column 'text': .* \(body, id\)"):
        prepared("parquet", folder, tmp_path / "out")
    (folder / "b.parquet").unlink()
    assert prepared("parquet", folder, tmp_path / "out")[0] == GOOD


def test_a_parquet_file_with_damaged_pages_is_named_with_the_row(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    texts = [f"{number} text" * 50 for number in range(4000)]
    parquet.write_table(
        pyarrow.table({"text": texts}), file, row_group_size=1000, compression="zstd", use_dictionary=False
    )
    content = bytearray(file.read_bytes())
    offset = parquet.read_metadata(file).row_group(2).column(0).data_page_offset
    content[offset : offset + 200] = b"\x00" * 200
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet is not a readable Parquet file \(after row 2000: "):
        prepared("parquet", file, tmp_path / "out")


def test_a_first_line_without_the_key_is_the_users_mistake(corpus: Path, tmp_path: Path) -> None:
    (corpus / "b.jsonl").write_bytes(b'{"body": "x", "id": 1}\n')
    with pytest.raises(DataError, match=r"b\.jsonl:1 has no column 'text': .* \(body, id\)"):
        prepared("jsonl", corpus, tmp_path / "out")


LARGE = """
import json, resource, sys
from titans_data import PrepareOptions, prepare
from titans_data._imports import import_extra, import_streaming
import_streaming(), import_extra("tokenizers"), import_extra("pyarrow")
def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak_mib()
card = prepare(PrepareOptions(**json.loads(sys.argv[1])), sys.argv[2])
split = card.splits["train"]
print(json.dumps([split.documents, split.tokens, split.bytes, peak_mib() - before]))
"""


@pytest.mark.parametrize("format", ["text", "jsonl"])
def test_a_document_of_50_mb_is_one_document_and_memory_stays_bounded(
    format: str, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    # Not ASCII, so that Python keeps 4 bytes per character: 200 MB.
    unit = "memory and surprise 测试 😀\n"
    text = unit * (50_000_000 // len(unit.encode()))
    for name, content in (("a", "before"), ("b", text), ("c", "after")):
        content = content if format == "text" else json.dumps({"text": content}, ensure_ascii=False)
        (folder / f"{name}.jsonl").write_text(content)
    options: dict[str, Any] = {"format": format, "source": str(folder), "tokenizer": "bytes", "validation_fraction": 0}
    child = start("-c", LARGE, json.dumps(options), tmp_path / "out")
    output = child.communicate(timeout=120)[0]
    assert child.returncode == 0, output
    documents, tokens, size, grown_mib = json.loads(output)
    expected = len(text.encode()) + len("before") + len("after")
    assert (documents, tokens, size) == (3, expected + 3, expected)
    assert grown_mib < 1024
    split = MdsSource(tmp_path / "out")
    _, numbers = split.read(0, split.num_tokens)
    assert numbers[[0, 6, 7, -8, -7, -6, -1]].tolist() == [0, 0, 1, 1, 1, 2, 2]
