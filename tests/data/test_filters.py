"""Optional stages of prepare: each filter, exact duplicates, and what the card says of them."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_data import DataError, MdsSource, PrepareOptions, load_tokenizer, prepare
from titans_data.dedup import entries, find_duplicates
from titans_data.filters import FILTERS, compression_ratio, rejected_by, repeated_lines
from titans_data.sample import WHOLE, EvenSample, first_threshold

PROSE = (
    "The memory of a model is a network that learns while it reads. What it did not expect it writes down, and what "
    "it no longer needs it lets go of; a gate decides how much of either.\nSurprise is the gradient of its loss, and "
    "momentum carries the surprise of a token to the ones that come after it."
)
NOISE = base64.b64encode(random.Random(1).randbytes(600)).decode()
BOILERPLATE = "Accept all cookies\n" * 40


def options_of(source: Path, **changes: Any) -> PrepareOptions:
    return PrepareOptions("jsonl", str(source), tokenizer="bytes", validation_fraction=0.0, **changes)


def kept(texts: list[str], folder: Path, **changes: Any) -> tuple[list[str], Any]:
    """The documents of a dataset prepared from texts, and its counts."""
    source = folder / "corpus.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    card = prepare(options_of(source, **changes), folder / "out")
    split = MdsSource(folder / "out")
    tokens = split.read(0, split.num_tokens)[0]
    return load_tokenizer(folder / "out" / "tokenizer").decode(tokens).split("<|endofdocument|>")[:-1], card.counts


@pytest.mark.parametrize(
    ("name", "value", "dropped"),
    [
        ("min_characters", 10, ["short"]),
        ("max_characters", 500, [NOISE, BOILERPLATE]),
        ("max_compression_ratio", 4.0, [BOILERPLATE]),
        ("min_compression_ratio", 1.35, ["short", NOISE]),
        ("max_repeated_lines", 0.3, [BOILERPLATE]),
    ],
)
def test_a_filter_drops_what_it_is_for_and_counts_it(
    name: str, value: float, dropped: list[str], tmp_path: Path
) -> None:
    texts = [PROSE, "short", NOISE, BOILERPLATE, PROSE + PROSE[:20]]
    found, counts = kept(texts, tmp_path, **{name: value})
    assert found == [text for text in texts if text not in dropped]
    assert counts.filtered == {name: len(dropped)}
    assert counts.documents == len(texts) - len(dropped)


def test_all_filters_are_off_by_default(tmp_path: Path) -> None:
    texts = ["short", NOISE, BOILERPLATE, "short"]
    found, counts = kept(texts, tmp_path)
    assert found == texts
    assert (counts.filtered, counts.duplicates) == ({}, 0)


def test_a_document_is_counted_by_the_first_filter_that_rejects_it(tmp_path: Path) -> None:
    found, counts = kept(
        [PROSE, BOILERPLATE, "x"], tmp_path, max_repeated_lines=0.3, max_characters=500, min_characters=2
    )
    assert found == [PROSE]
    assert counts.filtered == {"max_characters": 1, "min_characters": 1}


def test_every_document_is_kept_or_counted_once(tmp_path: Path) -> None:
    texts = [PROSE, "", BOILERPLATE, PROSE, "  \n", "x", NOISE, "x"]
    _, counts = kept(texts, tmp_path, deduplicate=True, min_characters=2, max_repeated_lines=0.5)
    assert counts.documents + counts.empty + sum(counts.filtered.values()) + counts.duplicates == len(texts)
    assert (counts.empty, counts.duplicates, counts.filtered) == (2, 1, {"max_repeated_lines": 1, "min_characters": 2})


def test_a_corpus_that_is_filtered_away_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 left out by min_characters"):
        kept(["a", "b"], tmp_path, min_characters=5)


def test_the_measures_are_what_they_say() -> None:
    assert repeated_lines("a b\n  a b \nc\n\n\n") == pytest.approx(3 / 7)
    assert repeated_lines("\n\n") == 0.0
    assert (
        compression_ratio(NOISE.encode()) < 1.35 < compression_ratio(PROSE.encode()) < 4 < compression_ratio(b"a" * 99)
    )


def test_filters_know_no_language() -> None:
    chinese = "记忆在测试时学习。惊讶是损失的梯度。" + "".join(
        chr(0x4E00 + number * 37 % 5000) for number in range(300)
    )
    options = options_of(Path("x"), max_compression_ratio=6, min_compression_ratio=1.1, max_repeated_lines=0.3)
    assert rejected_by(chinese, chinese.encode(), options) is None


@pytest.mark.parametrize("name", FILTERS)
def test_an_impossible_limit_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=f"{name} is -1"):
        options_of(Path("x"), **{name: -1})


# ---- duplicates


def test_the_first_of_equal_documents_stays_wherever_the_others_are(tmp_path: Path) -> None:
    """Over several parts: a third of the documents comes again, in other files and further down."""
    source = random.Random(2)
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts: list[str] = []
    for number in range(4):
        with (folder / f"{number}.jsonl").open("w") as file:
            for _ in range(1500):
                text = source.choice(texts) if texts and source.random() < 0.3 else source.randbytes(500).hex()
                texts.append(text)
                file.write(json.dumps({"text": text}) + "\n")
    card = prepare(options_of(folder, deduplicate=True), tmp_path / "out")
    unique = list(dict.fromkeys(texts))
    assert len({shard.name.split("/")[1] for shard in card.splits["train"].shards}) >= 3
    split = MdsSource(tmp_path / "out")
    tokens = split.read(0, split.num_tokens)[0]
    decoded = load_tokenizer(tmp_path / "out" / "tokenizer").decode(tokens)
    assert decoded.split("<|endofdocument|>")[:-1] == unique
    assert (card.counts.documents, card.counts.duplicates) == (len(unique), len(texts) - len(unique))


def test_only_equal_text_is_a_duplicate(tmp_path: Path) -> None:
    texts = ["a b", "a b ", "a  b", "A b", "a b"]
    assert kept(texts, tmp_path, deduplicate=True)[0] == texts[:-1]


@settings(max_examples=80, deadline=None)
@given(
    parts=st.lists(st.lists(st.integers(0, 12), max_size=20), min_size=1, max_size=5),
    bucket_entries=st.sampled_from([1, 3, 1000]),
)
def test_duplicates_are_those_of_a_plain_set(
    parts: list[list[int]], bucket_entries: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("hashes")
    files = []
    for number, values in enumerate(parts):
        # Digests that differ only in their first or only in their second half.
        digests = [(value % 4 << 62).to_bytes(8, "big") + (value // 4).to_bytes(8, "big") for value in values]
        files.append(folder / f"{number}.npy")
        np.save(files[-1], entries(digests))
    masks = find_duplicates(files, bucket_entries)
    seen: set[int] = set()
    for values, mask in zip(parts, masks, strict=True):
        bits = np.unpackbits(mask, bitorder="little")[: len(values)]
        for value, bit in zip(values, bits.tolist(), strict=True):
            assert bit == (value in seen)
            seen.add(value)


# ---- the sample of a corpus in parts


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), limit=st.sampled_from([1, 50, 2000, 10**6]), cuts=st.integers(1, 6))
def test_samples_of_parts_merge_into_the_sample_of_the_whole(seed: int, limit: int, cuts: int) -> None:
    source = random.Random(seed)
    texts = [source.choice("abc") * source.randrange(1, 200) + str(source.randrange(50)) for _ in range(100)]
    whole = EvenSample(limit)
    for text in texts:
        whole.add(text)
    merged = EvenSample(limit)
    for number in range(cuts):
        part = EvenSample(limit)
        for text in texts[len(texts) * number // cuts : len(texts) * (number + 1) // cuts]:
            part.add(text)
        merged.merge(part.threshold, part.pieces())
    assert merged.texts() == whole.texts()
    assert whole.texts()


def test_parts_of_a_huge_corpus_keep_little_from_the_start() -> None:
    assert first_threshold(8 << 20, 500 << 20) == WHOLE
    threshold = first_threshold(8 << 20, 10**13)
    assert 16 * (8 << 20) < 10**13 * threshold / WHOLE <= 64 * (8 << 20)
