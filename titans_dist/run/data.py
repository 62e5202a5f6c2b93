"""From the data configuration to rows of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from titans_dist.config import Config, ConfigError

if TYPE_CHECKING:
    from titans_data import TokenDataset, TokenSource


def open_rows(config: Config, split: str) -> TokenDataset:
    """The `train` or `validation` rows of sequence_length + 1 tokens.

    A prepared dataset has both splits; of a token file or synthetic tokens the end is held out.
    Raises DataError for data that is missing or damaged, ConfigError for a vocabulary the model does not have.
    """
    from titans_data import TokenDataset

    source = open_source(config, split)
    if source.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the data has {source.vocab_size} token ids but model.vocab_size={config.model.vocab_size}; "
            f"use model.vocab_size={-(-source.vocab_size // 64) * 64} or data of a smaller vocabulary"
        )
    return TokenDataset(source, config.data.sequence_length, packed=config.data.documents == "packed")


def open_source(config: Config, split: str) -> TokenSource:
    """The token stream of a split."""
    import titans_data

    data = config.data
    if data.format not in ("tokens", "synthetic"):
        return titans_data.MdsSource(data.path, split)
    whole: TokenSource
    if data.format == "tokens":
        whole = titans_data.TokenFileSource(data.path, data.dtype, data.vocab_size, data.end_of_document)
    else:
        whole = titans_data.SyntheticSource(data.vocab_size, data.synthetic_tokens, data.seed)
    held_out = int(whole.num_tokens * data.validation_fraction)
    cut = whole.num_tokens - held_out
    return titans_data.SpanSource(whole, 0, cut) if split == "train" else titans_data.SpanSource(whole, cut, held_out)
