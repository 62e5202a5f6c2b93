"""Preparing: the token stream is the documents, the folder is all or nothing, and the card tells the truth."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from titans_data import DataError, MdsSource, PrepareOptions, load_card, load_tokenizer, prepare, verify


def read_all(folder: Path, split: str) -> list[int]:
    source = MdsSource(folder, split)
    return source.read(0, source.num_tokens)[0].tolist()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_is_its_documents_one_after_the_other(prepared: Any, split: str) -> None:
    stream = getattr(prepared, split)
    assert stream.documents > 5
    assert read_all(prepared.folder, split) == stream.tokens


def test_the_card_counts_documents_tokens_and_bytes(prepared: Any) -> None:
    card = load_card(prepared.folder)
    assert card == prepared.card
    for split in ("train", "validation"):
        stream = getattr(prepared, split)
        on_card = card.splits[split]
        assert (on_card.documents, on_card.tokens, on_card.bytes) == (
            stream.documents,
            len(stream.tokens),
            stream.bytes,
        )
    assert card.counts.documents == len(prepared.documents)
    assert (card.vocab_size, card.end_of_document, card.dtype, card.page_tokens) == (257, 256, "uint16", 50)


def test_files_on_the_card_are_the_files_in_the_folder(prepared: Any, file_tree: Any) -> None:
    files = file_tree(prepared.folder)
    on_card = {file.name: file for split in prepared.card.splits.values() for file in (split.index, *split.shards)}
    assert len(prepared.card.splits["train"].shards) > 3
    assert set(files) == set(on_card) | {"dataset.json", "tokenizer/titans_tokenizer.json"}
    for name, file in on_card.items():
        assert (file.size_bytes, file.sha256) == (len(files[name]), hashlib.sha256(files[name]).hexdigest())
        assert file.size_bytes <= prepared.options.shard_bytes


def test_bits_per_byte_follow_from_the_card(tmp_path: Path) -> None:
    """A model that gives every one of the 257 tokens the same chance: bits for all tokens over bytes of all text."""
    (tmp_path / "corpus.txt").write_text("aé" * 500)
    card = prepare(
        PrepareOptions("text", str(tmp_path / "corpus.txt"), tokenizer="bytes", validation_fraction=0.0),
        tmp_path / "out",
    )
    assert card.splits["train"].bytes == 1500
    assert card.splits["train"].tokens == 1501
    loss_nats = math.log(257)
    bits_per_byte = loss_nats / MdsSource(tmp_path / "out").bytes_per_token / math.log(2)
    assert bits_per_byte == pytest.approx(1501 * math.log2(257) / 1500, rel=1e-12)


def test_held_out_documents_do_not_depend_on_the_others(prepared: Any, tmp_path: Path) -> None:
    """Dropping every second document moves none of the rest across the split."""
    corpus = tmp_path / "half"
    corpus.mkdir()
    for number, text in enumerate(prepared.documents[::2]):
        (corpus / f"{number:03}").write_bytes(text.encode())
    prepare(dataclasses.replace(prepared.options, source=str(corpus)), tmp_path / "out")

    def held_out(folder: Path) -> set[str]:
        return set(
            load_tokenizer(folder / "tokenizer").decode(read_all(folder, "validation")).split("<|endofdocument|>")
        )

    assert held_out(tmp_path / "out") - {""} == (held_out(prepared.folder) & set(prepared.documents[::2]))


def test_equal_options_give_equal_bytes(prepared: Any, tmp_path: Path, file_tree: Any) -> None:
    prepare(prepared.options, tmp_path / "again")
    assert file_tree(tmp_path / "again") == file_tree(prepared.folder)


def test_bpe_end_to_end(prepared: Any, tmp_path: Path, file_tree: Any) -> None:
    options = dataclasses.replace(prepared.options, tokenizer="bpe", vocab_size=300, tokenizer_sample_bytes=5000)
    card = prepare(options, tmp_path / "a")
    tokenizer = load_tokenizer(tmp_path / "a" / "tokenizer")
    assert card.tokenizer_fingerprint == tokenizer.fingerprint
    assert (card.vocab_size, card.end_of_document) == (tokenizer.vocab_size, tokenizer.end_of_document)
    texts = {"train": "", "validation": ""}
    for split in texts:
        ids = read_all(tmp_path / "a", split)
        assert ids.count(card.end_of_document) == card.splits[split].documents
        texts[split] = tokenizer.decode(ids)
    byte_texts = {
        split: load_tokenizer(prepared.folder / "tokenizer").decode(read_all(prepared.folder, split)) for split in texts
    }
    assert texts == byte_texts
    assert [card.splits[s].bytes for s in texts] == [prepared.card.splits[s].bytes for s in texts]
    prepare(options, tmp_path / "b")
    assert file_tree(tmp_path / "a") == file_tree(tmp_path / "b")


def test_a_vocabulary_beyond_16_bits_is_stored_in_32(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"w{i}": i for i in range(70_000)} | {"</s>": 70_000}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "corpus.txt").write_text("w1 w69999 w65536")
    options = PrepareOptions(
        "text", str(tmp_path / "corpus.txt"), tokenizer=str(tmp_path / "tokenizer.json"), validation_fraction=0.0
    )
    assert prepare(options, tmp_path / "out").dtype == "uint32"
    assert read_all(tmp_path / "out", "train") == [1, 69999, 65536, 70000]


def test_a_foreign_tokenizer_is_kept_with_the_dataset(tmp_path: Path, prepared: Any) -> None:
    first = prepare(dataclasses.replace(prepared.options, tokenizer="bpe", vocab_size=280), tmp_path / "a")
    options = dataclasses.replace(prepared.options, tokenizer=str(tmp_path / "a" / "tokenizer"))
    second = prepare(options, tmp_path / "b")
    assert second.fingerprint == first.fingerprint
    shutil.rmtree(tmp_path / "a")
    assert verify(tmp_path / "b").tokenizer_fingerprint == first.tokenizer_fingerprint


def test_what_was_dropped_or_replaced_is_on_the_card(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x\xff"}\n{"text": ""}\nnonsense\n')
    options = PrepareOptions("jsonl", str(tmp_path / "a.jsonl"), tokenizer="bytes", validation_fraction=0.0)
    prepare(options, tmp_path / "out")
    counts = load_card(tmp_path / "out").counts
    assert dataclasses.asdict(counts) == {
        "documents": 1,
        "bytes_read": 4,
        "empty": 1,
        "first_empty": f"{tmp_path}/a.jsonl:2",
        "replaced_documents": 1,
        "replaced_sequences": 1,
        "first_replaced": f"{tmp_path}/a.jsonl:1",
        "garbled_lines": 1,
        "garbled": [f"{tmp_path}/a.jsonl:3"],
        "filtered": {},
        "duplicates": 0,
    }
    # The bytes of a replaced sequence are those of the replacement, which is what the tokens spell.
    assert load_card(tmp_path / "out").splits["train"].bytes == len("x\ufffd".encode())


def test_progress_ends_with_the_whole_corpus(prepared: Any, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    options = dataclasses.replace(prepared.options, tokenizer="bpe", vocab_size=260)
    prepare(options, tmp_path / "out", lambda *report: seen.append(report))
    size = prepared.train.bytes + prepared.validation.bytes
    assert list(dict.fromkeys(stage for stage, _, _ in seen)) == ["scan", "tokenizer", "tokenize", "assemble"]
    assert ("scan", size, size) in seen
    assert ("tokenize", size, size) in seen


def test_nothing_is_printed(prepared: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prepare(dataclasses.replace(prepared.options, tokenizer="bpe", vocab_size=260), tmp_path / "out")
    assert capfd.readouterr() == ("", "")


# ---- a folder that is already there


def test_equal_options_return_the_card_without_reading_the_corpus(prepared: Any, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(prepared.corpus, corpus)
    options = dataclasses.replace(prepared.options, source=str(corpus))
    card = prepare(options, tmp_path / "out")
    shutil.rmtree(corpus)
    assert prepare(options, tmp_path / "out") == card


def test_other_options_are_refused_by_name(prepared: Any) -> None:
    options = dataclasses.replace(prepared.options, page_tokens=25, validation_fraction=0.1)
    with pytest.raises(DataError, match="page_tokens=50 there, 25 here") as refusal:
        prepare(options, prepared.folder)
    assert "validation_fraction=0.3 there, 0.1 here" in str(refusal.value)
    assert "shard_bytes" not in str(refusal.value)
    assert "remove the folder or choose another one" in str(refusal.value)


def test_a_folder_of_something_else_is_not_touched(prepared: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="is not a dataset"):
        prepare(prepared.options, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_is_filled(prepared: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert prepare(prepared.options, tmp_path / "out") == prepared.card


def test_a_failed_prepare_leaves_no_dataset(prepared: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" ")
    with pytest.raises(DataError, match="no document with text"):
        prepare(dataclasses.replace(prepared.options, source=str(tmp_path / "empty.txt")), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert prepare(prepared.options, tmp_path / "out") == prepared.card


def test_a_path_that_cannot_be_written_is_named(prepared: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"file/out cannot be written"):
        prepare(prepared.options, tmp_path / "file" / "out")


def test_all_documents_held_out_is_an_error(tmp_path: Path) -> None:
    text = next(t for t in map(str, range(1000)) if int(hashlib.sha256(t.encode()).hexdigest()[:16], 16) < 0.9 * 2**64)
    (tmp_path / "one.txt").write_text(text)
    options = PrepareOptions("text", str(tmp_path / "one.txt"), tokenizer="bytes", validation_fraction=0.9)
    with pytest.raises(DataError, match="fell into the validation split"):
        prepare(options, tmp_path / "out")


SLOW_PREPARE = """
import json, sys, time
from titans_data import PrepareOptions, prepare
def pause(stage, done, total):
    if stage == "tokenize" and done:
        print("tokenizing", flush=True)
        time.sleep(600)
prepare(PrepareOptions(**json.loads(sys.argv[1])), sys.argv[2], pause)
"""


def test_a_killed_prepare_leaves_nothing_finished_and_the_next_one_is_whole(
    prepared: Any, tmp_path: Path, start: Callable[..., subprocess.Popen[str]], file_tree: Any
) -> None:
    out = tmp_path / "out"
    child = start("-c", SLOW_PREPARE, json.dumps(dataclasses.asdict(prepared.options)), out)
    assert child.stdout is not None
    assert child.stdout.readline() == "tokenizing\n"
    assert list((tmp_path / "out.tmp").glob("unfinished/tokens-*/train/*.mds")), (
        "the kill has to come in the middle of the writing"
    )

    # Meanwhile nobody else may write to the same place.
    with pytest.raises(DataError, match="another process is preparing"):
        prepare(prepared.options, out)

    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert not out.exists()
    with pytest.raises(DataError, match="run `titans-dist prepare` first"):
        load_card(out)
    with pytest.raises(DataError, match="run `titans-dist prepare` first"):
        MdsSource(tmp_path / "out.tmp")

    prepare(prepared.options, out)
    assert file_tree(out) == file_tree(prepared.folder)
    assert not (tmp_path / "out.tmp").exists()


# ---- options


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "csv"}, "'csv': choose one of stdlib, text, jsonl"),
        ({"source": None}, "has no source"),
        ({"format": "stdlib"}, "leave source out"),
        ({"tokenizer": "bpe", "vocab_size": 256}, "vocab_size is 256"),
        ({"tokenizer_sample_bytes": 0}, "tokenizer_sample_bytes is 0"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"validation_fraction": math.nan}, "validation_fraction is nan"),
        ({"page_tokens": 0}, "page_tokens is 0"),
        ({"shard_bytes": 1000}, "with page_tokens=50 give 4496"),
        ({"shard_bytes": 1 << 32}, "shard_bytes is 4294967296"),
    ],
)
def test_impossible_options_are_refused_with_what_is_allowed(
    changes: dict[str, Any], words: str, prepared: Any
) -> None:
    with pytest.raises(DataError, match=words):
        dataclasses.replace(prepared.options, **changes)


# ---- cards


@pytest.fixture
def copy(prepared: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared.folder, tmp_path / "copy"))


def test_verify_accepts_an_untouched_dataset(prepared: Any, copy: Path) -> None:
    assert verify(copy) == prepared.card


@pytest.mark.parametrize(
    "name", ["train/00000/shard.00002.mds", "validation/00000/shard.00000.mds", "train/index.json"]
)
def test_verify_finds_one_changed_bit(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[random.Random(3).randrange(len(content))] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} does not have the sha256"):
        verify(copy)


def test_verify_finds_another_tokenizer(copy: Path, prepared: Any, tmp_path: Path) -> None:
    prepare(dataclasses.replace(prepared.options, tokenizer="bpe", vocab_size=260), tmp_path / "other")
    shutil.rmtree(copy / "tokenizer")
    shutil.copytree(tmp_path / "other" / "tokenizer", copy / "tokenizer")
    with pytest.raises(DataError, match="is not the tokenizer on the card"):
        verify(copy)


def test_verify_finds_a_card_that_contradicts_itself(copy: Path) -> None:
    card = json.loads((copy / "dataset.json").read_text())
    card["fingerprint"] = "0" * 64
    (copy / "dataset.json").write_text(json.dumps(card))
    with pytest.raises(DataError, match="contradicts its own fingerprint"):
        verify(copy)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "format version None"),
        ('{"format_version": 99}', "format version 99, this program reads 2"),
        ('{"format_version": 2}', "is not a dataset card"),
    ],
)
def test_a_card_that_cannot_be_used_is_explained(copy: Path, content: str, words: str) -> None:
    (copy / "dataset.json").write_text(content)
    with pytest.raises(DataError, match=words):
        load_card(copy)


def test_a_folder_without_a_card_says_to_prepare(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no dataset\.json: run `titans-dist prepare` first"):
        load_card(tmp_path)
    with pytest.raises(DataError, match="is not a folder: run `titans-dist prepare` first"):
        load_card(tmp_path / "absent")


def test_fingerprints_tell_datasets_apart(prepared: Any, tmp_path: Path) -> None:
    corpus = Path(shutil.copytree(prepared.corpus, tmp_path / "corpus"))
    (corpus / "000.txt").write_text("changed")
    other = prepare(dataclasses.replace(prepared.options, source=str(corpus)), tmp_path / "out")
    assert other.fingerprint != prepared.card.fingerprint
