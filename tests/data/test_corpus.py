"""Corpus readers: every format yields the same documents, and says in one sentence what it could not read."""

from __future__ import annotations

import dataclasses
import gzip
import json
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from titans_data import DataError, PrepareOptions, prepare
from titans_data.corpus import decode_utf8, read_corpus
from titans_data.tally import Place, Tally

TEXTS = ["first\r\nline", "zweiter Text, 测试", 'third "quoted"']


def read(format: str, source: object, column: str = "text") -> tuple[list[str], Tally]:
    tally = Tally()
    return [item.text for item in read_corpus(format, str(source), column, tally)], tally


def origins(format: str, source: object) -> list[str]:
    return [str(item.origin) for item in read_corpus(format, str(source), "text", Tally())]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts))
    return path


def write_text(path: Path) -> Path:
    path.mkdir()
    for number, text in enumerate(TEXTS):
        (path / f"{number}.md").write_bytes(text.encode())
    return path


def write_gzip(path: Path) -> Path:
    plain = write_jsonl(path.with_suffix(".jsonl"), TEXTS)
    packed = path.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    return packed


def write_zstd(path: Path) -> Path:
    plain = write_jsonl(path.with_suffix(".jsonl"), TEXTS)
    packed = path.with_suffix(".jsonl.zst")
    with pyarrow.output_stream(str(packed), compression="zstd") as stream:
        stream.write(plain.read_bytes())
    return packed


def write_parquet(path: Path) -> Path:
    file = path.with_suffix(".parquet")
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": TEXTS}), file, row_group_size=2)
    return file


def write_dictionary_parquet(path: Path) -> Path:
    file = path.with_suffix(".parquet")
    parquet.write_table(pyarrow.table({"text": pyarrow.array(TEXTS).dictionary_encode()}), file)
    return file


def write_huggingface(path: Path) -> Path:
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(path))
    return path


def write_huggingface_splits(path: Path) -> Path:
    import datasets

    train, test = datasets.Dataset.from_dict({"text": TEXTS}), datasets.Dataset.from_dict({"text": ["no"]})
    datasets.DatasetDict({"test": test, "train": train}).save_to_disk(str(path))
    return path


@pytest.mark.parametrize(
    ("format", "write"),
    [
        ("text", write_text),
        ("jsonl", lambda path: write_jsonl(path.with_suffix(".jsonl"), TEXTS)),
        ("jsonl", write_gzip),
        ("jsonl", write_zstd),
        ("parquet", write_parquet),
        ("parquet", write_dictionary_parquet),
        ("huggingface", write_huggingface),
        ("huggingface", write_huggingface_splits),
    ],
    ids=["text", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "parquet-dictionary", "saved", "saved-splits"],
)
def test_every_format_yields_the_same_documents(format: str, write: Callable[[Path], Path], tmp_path: Path) -> None:
    texts, counts = read(format, write(tmp_path / "corpus"))
    assert texts == TEXTS
    expected = Tally(bytes_read=sum(len(text.encode()) for text in TEXTS))
    assert dataclasses.replace(counts, lines=0) == expected


def test_a_folder_is_read_in_order_of_relative_path(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b/c.py", "a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read("text", tmp_path)[0] == ["a.txt", "a/b/c.py", "a/z.txt", "b.txt"]


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("no")
    (tmp_path / ".secret").write_text("no")
    (tmp_path / "seen.txt").write_text("yes")
    assert read("text", tmp_path)[0] == ["yes"]


def test_a_single_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("whole\nfile")
    assert read("text", tmp_path / "one")[0] == ["whole\nfile"]


def test_origins_say_file_line_or_row(tmp_path: Path) -> None:
    lines = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    rows = write_parquet(tmp_path / "b")
    assert origins("jsonl", lines)[1] == f"{lines}:2"
    assert origins("parquet", rows)[2] == f"{rows}[2]"


def test_stdlib_is_the_interpreters_python_files_without_installed_packages() -> None:
    reader = read_corpus("stdlib", None, "text", Tally())
    first = [next(reader) for _ in range(40)]
    root = Path(sysconfig.get_paths()["stdlib"])
    for item in first:
        assert (root / item.origin.file).read_bytes().decode("utf-8", "replace") == item.text
    assert [item.origin for item in first] == sorted(item.origin for item in first)
    everything = [str(item.origin) for item in read_corpus("stdlib", None, "text", Tally())]
    assert "json/decoder.py" in everything
    assert not [name for name in everything if "site-packages" in name or "__pycache__" in name]


# ---- what is not clean text


@pytest.mark.parametrize(
    ("raw", "text", "replaced"),
    [
        (b"plain", "plain", 0),
        (b"caf\xe9!", "caf�!", 1),
        (b"\xff\xfe two", "�� two", 2),
        ("already � there".encode(), "already � there", 0),
        ("one � and ".encode() + b"\xff", "one � and �", 1),
        (b"\xf0\xef\xbf\xbd", "��", 1),
    ],
)
def test_undecodable_sequences_are_replaced_and_counted(raw: bytes, text: str, replaced: int) -> None:
    assert decode_utf8(raw) == (text, replaced)


def test_replacements_are_counted_by_document_and_by_sequence(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xff\xff a")
    (tmp_path / "b").write_bytes(b"fine")
    (tmp_path / "c").write_bytes(b"\xff c")
    counts = read("text", tmp_path)[1]
    assert (counts.replaced_documents, counts.replaced_sequences) == (2, 3)


def test_half_a_surrogate_pair_in_json_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud800 b"}\n{"text": "\\ud83d\\ude00"}\n')
    texts, counts = read("jsonl", tmp_path)
    assert texts == ["a � b", "😀"]
    assert (counts.replaced_documents, counts.replaced_sequences) == (1, 1)


def test_empty_documents_are_dropped_and_counted(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["", "kept", " \n\t", "also"])
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"text": null}\n')
    texts, counts = read("jsonl", tmp_path)
    assert texts == ["kept", "also"]
    assert (counts.empty, counts.first_empty) == (3, Place(f"{tmp_path}/a.jsonl", line=1))


def test_garbled_lines_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "good"}\n\n{"text": "cut of\n[1, 2]\n{"text": 5}\n{"other": "x"}\n{"text": "last"}\n')
    texts, counts = read("jsonl", file)
    assert texts == ["good", "last"]
    assert counts.garbled_lines == 4
    assert [str(place) for place in counts.garbled] == [f"{file}:{line}" for line in (3, 4, 5, 6)]


def test_nothing_but_garbled_lines_is_an_error_that_names_the_first(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("nonsense\nmore\n")
    with pytest.raises(DataError, match=r"2 garbled lines, the first at .*a\.jsonl:1"):
        prepare(PrepareOptions("jsonl", str(file), tokenizer="bytes"), tmp_path / "out")


# ---- what cannot be read at all


@pytest.mark.parametrize("format", ["text", "jsonl", "parquet", "huggingface"])
def test_a_missing_path_is_named(format: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent does not exist"):
        read(format, tmp_path / "absent")


@pytest.mark.parametrize("format", ["text", "jsonl", "parquet"])
def test_a_folder_without_such_files_is_named(format: str, tmp_path: Path) -> None:
    (tmp_path / ".hidden").write_text("x")
    with pytest.raises(DataError, match="holds no"):
        read(format, tmp_path)


def test_a_corpus_of_empty_documents_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(DataError, match="1 empty documents"):
        prepare(PrepareOptions("text", str(tmp_path / "a.txt"), tokenizer="bytes"), tmp_path / "out")


@pytest.mark.parametrize("write", [write_parquet, write_huggingface], ids=["parquet", "huggingface"])
def test_a_missing_column_is_named_with_those_that_exist(write: Callable[[Path], Path], tmp_path: Path) -> None:
    format = write.__name__.removeprefix("write_")
    with pytest.raises(DataError, match=r"no column 'body'.*\(.*text.*\)"):
        read(format, write(tmp_path / "corpus"), "body")


def test_a_missing_json_key_is_named_with_those_that_exist(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(DataError, match=r"a\.jsonl:1 has no column 'body'.*\(text, id\)"):
        read("jsonl", file, "body")


def test_a_column_of_numbers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"column 'id'.*holds int64"):
        read("parquet", write_parquet(tmp_path / "a"), "id")


@pytest.mark.parametrize(
    ("format", "name", "content"),
    [
        ("parquet", "a.parquet", b"PAR1 nonsense"),
        ("jsonl", "a.jsonl.gz", b"\x1f\x8b nonsense"),
        ("jsonl", "a.jsonl.zst", b"nonsense"),
    ],
)
def test_a_damaged_file_is_named(format: str, name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        read(format, tmp_path / name)


def test_a_gzip_that_ends_too_early_is_named(tmp_path: Path) -> None:
    packed = write_gzip(tmp_path / "a")
    packed.write_bytes(packed.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz cannot be read"):
        read("jsonl", packed)


def test_a_folder_that_no_library_saved_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be loaded by the datasets library"):
        read("huggingface", tmp_path)
