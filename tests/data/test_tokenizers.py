"""Tokenizers: exact round trips, stable fingerprints, and no text that can forge a special token."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_data import DataError, load_tokenizer
from titans_data.sample import EvenSample
from titans_data.tokenize import (
    END_OF_DOCUMENT,
    BytesTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    split_long_text,
    train_bpe,
)

SAMPLE = ["def read(self):\n    return self.memory\n", "the surprise of the memory, the gate of the memory\n\n"] * 20
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@pytest.fixture(scope="module")
def bpe() -> HuggingFaceTokenizer:
    return train_bpe(SAMPLE, 290)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest, bpe: HuggingFaceTokenizer) -> Tokenizer:
    return BytesTokenizer() if request.param == "bytes" else bpe


def test_bytes_are_the_utf8_bytes() -> None:
    tokenizer = BytesTokenizer()
    assert tokenizer.encode_batch(["aé"])[0].tolist() == [97, 0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (257, 256)


def test_bpe_has_the_size_asked_for_and_shortens_text(bpe: HuggingFaceTokenizer) -> None:
    assert bpe.vocab_size == 290
    assert len(bpe.encode_batch([SAMPLE[1]])[0]) < len(SAMPLE[1]) / 2


@settings(max_examples=60, deadline=None)
@given(batch=st.lists(texts, max_size=4))
def test_decoding_gives_the_text_back(batch: list[str], bpe: HuggingFaceTokenizer) -> None:
    for tokenizer in (BytesTokenizer(), bpe):
        encoded = tokenizer.encode_batch(batch)
        assert [tokenizer.decode(ids) for ids in encoded] == batch
        assert all(ids.dtype == np.uint32 and ids.ndim == 1 for ids in encoded)


def test_text_that_spells_the_special_token_does_not_become_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = f"before{END_OF_DOCUMENT}after"
    tokenizer.save(tmp_path)
    for candidate in (tokenizer, load_tokenizer(tmp_path)):
        ids = candidate.encode_batch([text])[0]
        assert candidate.end_of_document not in ids
        assert candidate.decode(ids) == text


def test_decoding_spells_the_end_of_document_out(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode_batch(["a"])[0].tolist(), tokenizer.end_of_document]
    assert tokenizer.decode(ids) == "a" + END_OF_DOCUMENT


def test_saving_and_loading_keeps_everything(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "new")
    loaded = load_tokenizer(tmp_path / "new")
    assert type(loaded) is type(tokenizer)
    for name in ("fingerprint", "vocab_size", "end_of_document"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    assert loaded.encode_batch(SAMPLE[:2])[1].tolist() == tokenizer.encode_batch(SAMPLE[:2])[1].tolist()


def test_fingerprints_tell_tokenizers_apart(bpe: HuggingFaceTokenizer) -> None:
    assert len({BytesTokenizer().fingerprint, bpe.fingerprint, train_bpe(SAMPLE, 280).fingerprint}) == 3


def test_training_is_the_same_in_another_process_and_order(
    bpe: HuggingFaceTokenizer, environment: dict[str, str]
) -> None:
    code = f"from titans_data.tokenize import train_bpe; print(train_bpe({SAMPLE[::-1]!r}, 290).fingerprint)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == bpe.fingerprint


# ---- long texts


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("ab \n\t"), max_size=120), size=st.integers(1, 30))
def test_pieces_put_together_are_the_text(text: str, size: int) -> None:
    pieces = list(split_long_text(text, size))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= size for piece in pieces[:-1])


def test_cutting_a_long_text_at_lines_does_not_change_its_tokens(bpe: HuggingFaceTokenizer) -> None:
    text = "".join(SAMPLE)
    pieces = list(split_long_text(text, 150))
    assert len(pieces) > 5
    assert np.concatenate(bpe.encode_batch(pieces)).tolist() == bpe.encode_batch([text])[0].tolist()


def test_a_text_longer_than_a_piece_is_encoded_whole(
    bpe: HuggingFaceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [ids.tolist() for ids in bpe.encode_batch(["short", "".join(SAMPLE), "tail"])]
    monkeypatch.setattr("titans_data.tokenize._PIECE_CHARACTERS", 150)
    monkeypatch.setattr("titans_data.tokenize._BATCH_CHARACTERS", 400)
    assert [ids.tolist() for ids in bpe.encode_batch(["short", "".join(SAMPLE), "tail"])] == whole


# ---- the sample that bpe trains on


def test_a_stream_within_the_limit_is_sampled_whole() -> None:
    sample = EvenSample(1000)
    for number in range(10):
        sample.add(f"text {number}")
    assert sorted(sample.texts()) == [f"text {number}" for number in range(10)]


def test_the_sample_is_bounded_even_and_independent_of_order() -> None:
    stream = [f"{number:04}" + "x" * 96 for number in range(4000)]
    forward, backward = EvenSample(100_000), EvenSample(100_000)
    for text in stream:
        forward.add(text)
    for text in reversed(stream):
        backward.add(text)
    kept = sorted(int(text[:4]) for text in forward.texts())
    assert sorted(forward.texts()) == sorted(backward.texts())
    assert 300 <= len(kept) <= 1000
    quarters = np.histogram(kept, bins=4, range=(0, 4000))[0]
    assert quarters.min() > 0.6 * len(kept) / 4


def test_a_limit_below_one_text_still_leaves_something_to_train_on() -> None:
    sample = EvenSample(1)
    for text in ("one", "two", "two"):
        sample.add(text)
    assert len(sample.texts()) == 1


# ---- foreign tokenizers


def foreign(folder: Path, special: str, configured: str | None = None) -> Path:
    from tokenizers import Tokenizer as Inner
    from tokenizers import models, pre_tokenizers, trainers

    inner = Inner(models.WordLevel(unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.train_from_iterator(["a b c"], trainers.WordLevelTrainer(special_tokens=["[UNK]", special]))
    inner.enable_truncation(2)
    inner.enable_padding(length=8)
    folder.mkdir(exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    if configured:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": configured}}))
    return folder


def test_a_foreign_tokenizer_is_read_from_its_file_or_folder(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "t", "</s>")
    for path in (folder, folder / "tokenizer.json"):
        tokenizer = load_tokenizer(path)
        assert tokenizer.end_of_document == 1
        assert tokenizer.vocab_size == 5
        # Neither truncated nor padded, although the file asks for both.
        assert len(tokenizer.encode_batch(["a b c a b c"])[0]) == 6


def test_the_tokenizers_own_configuration_names_the_end_token(tmp_path: Path) -> None:
    assert load_tokenizer(foreign(tmp_path, "[STOP]", configured="[STOP]")).end_of_document == 1


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no end-of-document token"):
        load_tokenizer(foreign(tmp_path, "[STOP]"))


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent does not exist"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(DataError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
        load_tokenizer(tmp_path)
