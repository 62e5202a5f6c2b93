"""Token sources: any span equals the same span of a plain list, and damage is named."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_data import DataError, MdsSource, SpanSource, SyntheticSource, TokenFileSource, TokenSource, open_source
from titans_data.pages import PageWriter, page_count


def assert_span(source: TokenSource, stream: Any, start: int, length: int) -> None:
    tokens, documents = source.read(start, length)
    expected_tokens, expected_documents = stream.span(start, length)
    assert tokens.tolist() == expected_tokens
    assert documents.tolist() == expected_documents
    assert (tokens.dtype, documents.dtype) == (np.int64, np.int32)


# ---- prepared datasets


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_span_of_a_dataset_is_that_span_of_its_documents(data: st.DataObject, prepared: Any) -> None:
    split = data.draw(st.sampled_from(["train", "validation"]))
    source, stream = MdsSource(prepared.folder, split), getattr(prepared, split)
    assert source.num_tokens == len(stream.tokens)
    start = data.draw(st.integers(0, source.num_tokens - 1))
    length = data.draw(st.integers(1, min(300, source.num_tokens - start)))
    assert_span(source, stream, start, length)


def test_spans_at_the_edges(prepared: Any) -> None:
    source = MdsSource(prepared.folder)
    total = source.num_tokens
    assert total % 50, "the last page has to be a short one"
    for start, length in ((0, 1), (0, total), (total - 1, 1), (49, 2), (50, 50), (0, 50)):
        assert_span(source, prepared.train, start, length)


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 0), (0, -3)])
def test_a_span_outside_the_stream_is_an_index_error(start: int, length: int, prepared: Any) -> None:
    source = MdsSource(prepared.folder)
    with pytest.raises(IndexError):
        source.read(start, length)
    with pytest.raises(IndexError):
        source.read(source.num_tokens - 1, 2)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), page_tokens=st.integers(1, 17))
def test_pages_are_the_plain_stream_cut_at_every_page_tokens(
    lengths: list[int], page_tokens: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Page arithmetic by itself, against a concatenated list, read back with nothing but streaming."""
    from streaming import LocalDataset

    folder = tmp_path_factory.mktemp("pages")
    writer = PageWriter(folder, np.dtype("uint16"), page_tokens, 8 * page_tokens + 4096)
    stream: list[int] = []
    starts: list[int] = []
    for number, length in enumerate(lengths):
        starts.append(len(stream))
        document = [number * 100 + i for i in range(length)]
        stream += document
        writer.add(np.array(document))
    writer.finish()
    pages = [(sample["tokens"], np.frombuffer(sample["starts"], "<i4")) for sample in LocalDataset(str(folder))]
    assert len(pages) == page_count(len(stream), page_tokens)
    assert [token for tokens, _ in pages for token in tokens.tolist()] == stream
    assert [len(tokens) for tokens, _ in pages[:-1]] == [page_tokens] * (len(pages) - 1)
    assert [i * page_tokens + start for i, (_, begin) in enumerate(pages) for start in begin.tolist()] == starts
    assert (writer.tokens, writer.documents) == (len(stream), len(lengths))


def test_bytes_per_token_and_vocabulary_come_from_the_card(prepared: Any) -> None:
    source = MdsSource(prepared.folder, "validation")
    assert source.bytes_per_token == prepared.validation.bytes / len(prepared.validation.tokens)
    assert (source.vocab_size, source.end_of_document) == (257, 256)


def test_fingerprints_differ_by_split_and_survive_pickling(prepared: Any) -> None:
    train, validation = MdsSource(prepared.folder), MdsSource(prepared.folder, "validation")
    assert train.fingerprint != validation.fingerprint
    again = pickle.loads(pickle.dumps(validation))
    assert again.fingerprint == validation.fingerprint
    assert_span(again, prepared.validation, 3, 200)


# ---- damaged datasets


@pytest.fixture
def copy(prepared: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared.folder, tmp_path / "copy"))


@pytest.fixture
def shard(prepared: Any, copy: Path) -> Path:
    """The second shard of the copy's train split."""
    return copy / prepared.card.splits["train"].shards[1].name


def test_a_missing_shard_is_named_at_open(copy: Path, shard: Path) -> None:
    shard.unlink()
    with pytest.raises(DataError, match=rf"{shard} cannot be found"):
        MdsSource(copy)


def test_a_truncated_shard_is_named_at_open(copy: Path, shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{shard} has \d+ bytes, its card says \d+"):
        MdsSource(copy)


def test_a_shard_that_vanishes_while_reading_is_a_data_error(copy: Path, shard: Path) -> None:
    source = MdsSource(copy)
    shard.unlink()
    with pytest.raises(DataError, match=rf"page 0 of {shard} cannot be read"):
        source.read(0, source.num_tokens)


def test_overwritten_pages_are_a_data_error(copy: Path, shard: Path) -> None:
    """Every byte of a shard set to the same value: whatever part is damaged, the reader says so and does not crash."""
    size = shard.stat().st_size
    for value in (0x00, 0xFF):
        shard.write_bytes(bytes([value]) * size)
        source = MdsSource(copy)
        with pytest.raises(DataError, match=rf"page 0 of {shard} cannot be read"):
            source.read(0, source.num_tokens)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_byte_of_a_shard_can_crash_the_reader(
    data: st.DataObject, prepared: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A flipped bit gives other tokens, which only a checksum can tell, or a DataError, but nothing else."""
    name = prepared.card.splits["train"].shards[1].name
    copy = tmp_path_factory.getbasetemp() / "flipped"
    if not copy.exists():
        shutil.copytree(prepared.folder, copy)
    content = bytearray((prepared.folder / name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (copy / name).write_bytes(content)
    source = MdsSource(copy)
    try:
        tokens, documents = source.read(0, source.num_tokens)
    except DataError:
        return
    assert len(tokens) == len(documents) == source.num_tokens
    assert tokens.max() < source.vocab_size


def test_a_token_outside_the_vocabulary_is_a_data_error(copy: Path) -> None:
    card = json.loads((copy / "dataset.json").read_text())
    card["vocab_size"] = 200
    (copy / "dataset.json").write_text(json.dumps(card))
    source = MdsSource(copy)
    with pytest.raises(DataError, match=r"holds token 256, its vocabulary ends at 199"):
        source.read(0, source.num_tokens)


def replace_index(folder: Path, index: bytes) -> None:
    """Put another index in place, with a card that agrees on its size."""
    (folder / "train" / "index.json").write_bytes(index)
    card = json.loads((folder / "dataset.json").read_text())
    card["splits"]["train"]["index"]["size_bytes"] = len(index)
    (folder / "dataset.json").write_text(json.dumps(card))


def test_a_damaged_index_is_a_data_error(copy: Path) -> None:
    replace_index(copy, b'{"version": 2, "shards": [')
    with pytest.raises(DataError, match="damaged index"):
        MdsSource(copy)


def test_a_pickled_column_is_never_opened(copy: Path) -> None:
    index = (copy / "train" / "index.json").read_bytes()
    replace_index(copy, index.replace(b'"bytes", "ndarray:uint16"', b'"pkl", "ndarray:uint16"'))
    assert b'"pkl"' in (copy / "train" / "index.json").read_bytes()
    with pytest.raises(DataError, match="does not hold the pages on its card"):
        MdsSource(copy)


def test_an_index_that_lacks_a_shard_is_a_data_error(copy: Path) -> None:
    index = json.loads((copy / "train" / "index.json").read_text())
    del index["shards"][0]
    replace_index(copy, json.dumps(index).encode())
    with pytest.raises(DataError, match="does not hold the pages on its card"):
        MdsSource(copy)


def test_an_unknown_split_is_named(prepared: Any) -> None:
    with pytest.raises(DataError, match="no split 'test': choose one of train, validation"):
        MdsSource(prepared.folder, "test")


def test_an_empty_split_says_how_to_fill_it(tmp_path: Path) -> None:
    from titans_data import PrepareOptions, prepare

    (tmp_path / "one.txt").write_text("only")
    options = PrepareOptions("text", str(tmp_path / "one.txt"), tokenizer="bytes", validation_fraction=0.0)
    prepare(options, tmp_path / "out")
    with pytest.raises(DataError, match=r"'validation' .* is empty: .* larger validation_fraction than 0\.0"):
        MdsSource(tmp_path / "out", "validation")


# ---- flat token files


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_flat_file_is_read_as_it_was_written(dtype: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 60_000, 999)
    values.astype(dtype).tofile(tmp_path / "train.bin")
    source = TokenFileSource(tmp_path / "train.bin", dtype, 60_000)
    tokens, documents = source.read(100, 250)
    assert source.num_tokens == 999
    assert tokens.tolist() == values[100:350].tolist()
    assert documents.tolist() == [0] * 250
    assert source.bytes_per_token is None


def test_documents_of_a_flat_file_start_after_the_end_token(tmp_path: Path) -> None:
    np.array([7, 9, 9, 5, 6, 9, 4], np.uint16).tofile(tmp_path / "a.bin")
    source = TokenFileSource(tmp_path / "a.bin", "uint16", 10, end_of_document=9)
    assert source.read(0, 7)[1].tolist() == [0, 0, 1, 2, 2, 2, 3]
    assert source.read(1, 3)[1].tolist() == [0, 1, 2]


def test_a_flat_file_of_half_a_token_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"123456789")
    with pytest.raises(DataError, match=r"9 bytes, which is no whole number of uint16 tokens of 2 bytes"):
        TokenFileSource(tmp_path / "a.bin", "uint16", 10)
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(DataError, match="0 bytes"):
        TokenFileSource(tmp_path / "a.bin", "uint16", 10)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dtype": "int16"}, "dtype of .* is 'int16': choose one of uint16, uint32"),
        ({"vocab_size": 0}, "vocab_size of .* is 0"),
        ({"vocab_size": 10, "end_of_document": 10}, "end_of_document of .* is 10: give an id from 0 to 9"),
        ({"vocab_size": 3}, "holds token 4, its vocabulary ends at 2"),
    ],
)
def test_wrong_settings_of_a_flat_file_are_explained(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    np.arange(5, dtype=np.uint16).tofile(tmp_path / "a.bin")
    with pytest.raises(DataError, match=words):
        TokenFileSource(tmp_path / "a.bin", **settings).read(0, 5)


def test_a_missing_flat_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a file"):
        TokenFileSource(tmp_path / "absent.bin", "uint16", 10)


def test_the_fingerprint_of_a_flat_file_follows_content_and_settings(tmp_path: Path) -> None:
    values = np.arange(1000, dtype=np.uint16)
    seen = set()
    for name, content in (("a", values), ("b", values[:-1]), ("c", values[::-1])):
        content.tofile(tmp_path / name)
        seen.add(TokenFileSource(tmp_path / name, "uint16", 1000).fingerprint)
    seen.add(TokenFileSource(tmp_path / "a", "uint16", 1001).fingerprint)
    seen.add(TokenFileSource(tmp_path / "a", "uint16", 1000, end_of_document=3).fingerprint)
    assert len(seen) == 5
    shutil.copy(tmp_path / "a", tmp_path / "same")
    assert TokenFileSource(tmp_path / "same", "uint16", 1000).fingerprint in seen


# ---- synthetic


@settings(max_examples=80, deadline=None)
@given(
    vocab_size=st.sampled_from([2, 3, 64, 257, 50_257, 1 << 31]),
    seed=st.integers(0, 1 << 63),
    start=st.integers(0, 3000),
    length=st.integers(1, 900),
)
def test_synthetic_spans_agree_where_they_overlap(vocab_size: int, seed: int, start: int, length: int) -> None:
    source = SyntheticSource(vocab_size, 4000, seed)
    tokens, documents = source.read(start, length)
    whole, whole_documents = SyntheticSource(vocab_size, 4000, seed).read(0, 4000)
    assert tokens.tolist() == whole[start : start + length].tolist()
    assert documents.tolist() == (whole_documents - whole_documents[start])[start : start + length].tolist()
    assert 0 <= whole.min() <= whole.max() < vocab_size


def test_the_synthetic_next_token_is_mostly_a_function_of_the_last() -> None:
    """What a bigram table fitted on one half predicts on the other: nine in ten."""
    tokens, documents = SyntheticSource(64, 100_000, 5).read(0, 100_000)
    counts = np.zeros((64, 64), int)
    np.add.at(counts, (tokens[:50_000], tokens[1:50_001]), 1)
    right = counts.argmax(1)[tokens[50_000:-1]] == tokens[50_001:]
    assert 0.88 < right.mean() < 0.93
    assert len(np.unique(tokens)) == 64
    assert documents[-1] == 100_000 // 512


def test_synthetic_streams_differ_by_seed() -> None:
    first, second = (SyntheticSource(257, 2000, seed) for seed in (0, 1))
    assert first.fingerprint != second.fingerprint
    assert first.read(0, 2000)[0].tolist() != second.read(0, 2000)[0].tolist()


@pytest.mark.parametrize(("vocab_size", "num_tokens", "seed"), [(1, 10, 0), (10, 0, 0), (10, 10, -1)])
def test_impossible_synthetic_settings_are_refused(vocab_size: int, num_tokens: int, seed: int) -> None:
    with pytest.raises(DataError, match="of a synthetic source is"):
        SyntheticSource(vocab_size, num_tokens, seed)


# ---- a part of a source


def test_a_part_of_a_source_counts_from_its_own_start(prepared: Any) -> None:
    part = SpanSource(MdsSource(prepared.folder), 30, 400)
    assert part.num_tokens == 400
    for start, length in ((0, 400), (7, 100), (399, 1)):
        tokens, documents = part.read(start, length)
        assert (tokens.tolist(), documents.tolist()) == prepared.train.span(30 + start, length)
    for start, length in ((-1, 2), (399, 2), (0, 0)):
        with pytest.raises(IndexError):
            part.read(start, length)


def test_two_parts_of_a_source_have_two_fingerprints() -> None:
    whole = SyntheticSource(64, 1000, 0)
    assert len({whole.fingerprint, SpanSource(whole, 0, 900).fingerprint, SpanSource(whole, 1, 900).fingerprint}) == 3


@pytest.mark.parametrize(("start", "num_tokens"), [(0, 0), (-1, 5), (990, 11)])
def test_a_part_that_is_not_inside_is_refused(start: int, num_tokens: int) -> None:
    with pytest.raises(DataError, match="is not inside the 1000 tokens"):
        SpanSource(SyntheticSource(64, 1000, 0), start, num_tokens)


# ---- one way to open either


def test_open_source_tells_folders_from_files(prepared: Any, tmp_path: Path) -> None:
    assert_span(open_source(prepared.folder, "validation"), prepared.validation, 5, 100)
    np.arange(5, dtype=np.uint32).tofile(tmp_path / "a.bin")
    assert open_source(tmp_path / "a.bin", dtype="uint32", vocab_size=5).read(1, 3)[0].tolist() == [1, 2, 3]
    with pytest.raises(DataError, match="give both"):
        open_source(tmp_path / "a.bin")
    with pytest.raises(DataError, match="is not a folder"):
        open_source(tmp_path / "absent")
