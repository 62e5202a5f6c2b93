"""From the data configuration to rows: which tokens train, which are held out, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from titans_data import DataError, PrepareOptions, SyntheticSource, TokenSource, prepare
from titans_dist.config import Config, ConfigError, DataConfig, ModelConfig
from titans_dist.run.data import open_rows, open_sources

TOKENS = 1003


def configured(data: DataConfig, vocab_size: int = 2000) -> Config:
    data.sequence_length = 16
    return Config(name="x", run_dir="x", model=ModelConfig(vocab_size=vocab_size), data=data)


@pytest.fixture
def token_file(tmp_path: Path) -> DataConfig:
    """A real file of uint16 tokens, each equal to its place."""
    path = tmp_path / "tokens.bin"
    np.arange(TOKENS, dtype="<u2").tofile(path)
    return DataConfig(format="tokens", path=str(path), dtype="uint16", vocab_size=1024, validation_fraction=0.1)


def everything(source: TokenSource) -> list[int]:
    return source.read(0, source.num_tokens)[0].tolist()


def test_the_end_of_a_token_file_is_held_out(token_file: DataConfig) -> None:
    config = configured(token_file)
    assert everything(open_sources(config, "train")["main"]) == list(range(903))
    assert everything(open_sources(config, "validation")["main"]) == list(range(903, TOKENS))


def test_the_rows_of_the_splits_share_no_token(token_file: DataConfig) -> None:
    config = configured(token_file)
    train, validation = open_rows(config, "train"), open_rows(config, "validation")
    assert train[0]["tokens"].tolist() == list(range(17))
    assert train[len(train) - 1]["tokens"].max() < 903
    assert validation[0]["tokens"].tolist() == list(range(903, 920))
    assert (len(train), len(validation)) == (902 // 16, 99 // 16)


def test_packed_rows_of_a_token_file_know_its_documents(token_file: DataConfig) -> None:
    assert "starts" not in open_rows(configured(token_file), "train")[0]
    token_file.documents, token_file.end_of_document = "packed", 20
    starts = open_rows(configured(token_file), "train").row(1, continues=True)["starts"]
    assert starts.nonzero().flatten().tolist() == [21 - 16]


def test_of_synthetic_tokens_the_end_is_held_out_too() -> None:
    data = DataConfig(format="synthetic", path="", vocab_size=97, synthetic_tokens=TOKENS, validation_fraction=0.25)
    config = configured(data)
    stream = everything(SyntheticSource(97, TOKENS, data.seed))
    assert everything(open_sources(config, "train")["main"]) == stream[:753]
    assert everything(open_sources(config, "validation")["main"]) == stream[753:]
    data.seed += 1
    assert everything(open_sources(config, "train")["main"]) != stream[:753]


def test_the_splits_of_a_prepared_dataset_are_its_own(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"text {number}\n" * 20)
    options = PrepareOptions(format="text", source=str(tmp_path), tokenizer="bytes", validation_fraction=0.3)
    card = prepare(options, tmp_path / "prepared")
    config = configured(DataConfig(format="text", path=str(tmp_path / "prepared")))
    sources = {split: open_sources(config, split)["main"] for split in ("train", "validation")}
    assert {split: source.num_tokens for split, source in sources.items()} == {
        split: card.splits[split].tokens for split in sources
    }
    assert sources["train"].fingerprint != sources["validation"].fingerprint


def test_a_vocabulary_the_model_does_not_have_is_refused_with_the_mend(token_file: DataConfig) -> None:
    token_file.vocab_size = 1010
    with pytest.raises(ConfigError) as refusal:
        open_rows(configured(token_file, vocab_size=1009), "train")
    assert str(refusal.value) == (
        "the data has 1010 token ids but model.vocab_size=1009; "
        "use model.vocab_size=1024 or data of a smaller vocabulary"
    )
    assert len(open_rows(configured(token_file, vocab_size=1010), "train")) > 0


def test_a_held_out_part_that_is_too_short_is_refused(token_file: DataConfig) -> None:
    token_file.validation_fraction = 0.01
    with pytest.raises(DataError, match="the data has 10 tokens and one row of sequence_length 16 needs 17"):
        open_rows(configured(token_file), "validation")
    token_file.validation_fraction = 0.0001
    with pytest.raises(DataError, match=r"a part of 0 tokens .* another validation_fraction"):
        open_rows(configured(token_file), "validation")
