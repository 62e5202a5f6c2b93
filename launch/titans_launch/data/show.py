"""`titans-dist data show`: the text that a rank reads at a step, and where it comes from."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

import numpy as np

from titans_dist.config import Config, ConfigError
from titans_dist.run.data import open_tokenizer
from titans_launch import tables
from titans_launch.data import opened

if TYPE_CHECKING:
    from titans_data.samples import Sample
    from titans_data.tokenize import Tokenizer
    from titans_dist.run.data import TrainingData

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that would do something to a terminal, but line breaks and tabs."""


def run(config: Config) -> None:
    """Print the first sequences of the rank at the step."""
    from titans_data.samples import samples

    inspect, ranks = config.inspect, opened.ranks(config)
    share = config.training.global_batch_size // ranks
    if inspect.sequences > share:
        raise ConfigError(
            f"inspect.sequences={inspect.sequences} is more than the {share} that one of {ranks} ranks gets of "
            f"training.global_batch_size={config.training.global_batch_size}; use {share} or less"
        )
    read, step = opened.training_data(config), inspect.step or 1
    opened.said(config, read)
    batch = list(samples(read.data.schedule, read.data.sources, read.index(step), ranks))
    for sample in batch[inspect.rank * share :][: inspect.sequences]:
        show(config, read.data, sample, step)


def show(config: Config, data: TrainingData, sample: Sample, step: int) -> None:
    """Print one sequence: a table, and its text document by document."""
    source, row = data.sources[sample.source], sample.row
    if source.name not in opened.names(config):
        raise ConfigError(
            f"step {step} reads {source.name}, which is no longer configured; add "
            f"+data.sources.{source.name}=FOLDER to show it"
        )
    before = sum(other.rows for other in data.sources[: sample.source])
    item = data.rows.row(before + row, sample.continues)
    tokens, documents = item["tokens"].numpy(), item["documents"].numpy()
    begins = np.flatnonzero(np.diff(documents)) + 1
    length = config.data.sequence_length
    continues = ", goes on from the step before" if sample.continues else ""
    tables.show(
        f"step {step:,}, rank {sample.rank}, sequence {sample.slot} of the batch",
        [
            ("dataset", opened.label(config, source.name)),
            ("epoch", f"{sample.epoch + 1:,}"),
            ("row", f"{row:,} of {source.rows:,}{continues}"),
            ("tokens", f"{row * length:,} to {row * length + length:,} of {source.tokens:,}"),
            ("documents begin", ", ".join(f"at {begin}" for begin in begins) or "nowhere inside"),
        ],
    )
    tokenizer = open_tokenizer(config, source.name)
    for begin, end in itertools.pairwise([0, *begins, len(tokens)]):
        if begin:
            print(f"--- document from token {begin} on ---")
        print(text(tokens[begin:end], tokenizer))
    print()


def text(tokens: np.ndarray, tokenizer: Tokenizer | None) -> str:
    """Tokens as text that does nothing to a terminal, or as numbers."""
    if tokenizer is None:
        return " ".join(map(str, tokens))
    return CONTROLS.sub(lambda match: repr(match[0])[1:-1], tokenizer.decode(tokens))
