"""Shards of any length, in folders, each of which may end with a short page."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_data import MdsSource, SpanSource, SyntheticSource, TokenFileSource
from titans_data.card import CorpusCounts, DatasetCard, PrepareOptions, ShardCard, SplitCard, describe_file
from titans_data.pages import PageWriter


@dataclass(frozen=True)
class Parts:
    folder: Path
    tokens: list[int]
    is_start: list[bool]
    shard_tokens: list[int]

    def span(self, start: int, length: int) -> tuple[list[int], list[int]]:
        """What a source has to return, by the plainest means."""
        documents = accumulate(self.is_start[start + 1 : start + length], initial=0)
        return self.tokens[start : start + length], list(documents)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """A dataset of three folders of shards, most of which end with a short page."""
    folder = tmp_path_factory.mktemp("parts")
    draw = random.Random(3)
    lengths = [[draw.randint(1, 900) for _ in range(count)] for count in (9, 1, 14)]
    tokens: list[int] = []
    is_start: list[bool] = []
    shards: list[ShardCard] = []
    entries: list[Any] = []
    for number, documents in enumerate(lengths):
        name = f"{number:05}"
        writer = PageWriter(folder / "train" / name, np.dtype("uint16"), 50, 4496)
        for length in documents:
            document = [draw.randrange(256) for _ in range(length - 1)] + [256]
            tokens += document
            is_start += [True] + [False] * (length - 1)
            writer.add(np.array(document))
        writer.finish()
        index = json.loads((folder / "train" / name / "index.json").read_text())
        rest = sum(documents)
        for entry in index["shards"]:
            entry["raw_data"]["basename"] = f"{name}/{entry['raw_data']['basename']}"
            held = min(rest, 50 * entry["samples"])
            rest -= held
            file = describe_file(folder, f"train/{entry['raw_data']['basename']}")
            shards.append(ShardCard(file.name, file.size_bytes, file.sha256, held))
            entries.append(entry)
    (folder / "train" / "index.json").write_text(json.dumps({"version": 2, "shards": entries}))
    split = SplitCard(24, len(tokens), len(tokens) - 24, describe_file(folder, "train/index.json"), tuple(shards))
    options = PrepareOptions("text", "corpus", tokenizer="bytes", page_tokens=50, shard_bytes=4496)
    DatasetCard(options, "", 257, 256, "uint16", 50, CorpusCounts(), {"train": split}, "x").write(folder)
    return Parts(folder, tokens, is_start, [shard.tokens for shard in shards])


def test_the_shards_of_a_source_are_those_on_its_card(parts: Parts) -> None:
    source = MdsSource(parts.folder)
    assert len(parts.shard_tokens) > 6 and sum(tokens % 50 > 0 for tokens in parts.shard_tokens) == 3
    assert source.shards.tolist() == list(accumulate(parts.shard_tokens, initial=0))
    assert source.shards.dtype == np.int64


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_span_over_shards_that_end_with_short_pages(data: st.DataObject, parts: Parts) -> None:
    source = MdsSource(parts.folder)
    edges = st.sampled_from(source.shards.tolist()).flatmap(lambda edge: st.integers(edge - 3, edge + 3))
    start = data.draw((st.integers(0, source.num_tokens - 1) | edges).filter(lambda x: 0 <= x < source.num_tokens))
    length = data.draw(st.integers(1, source.num_tokens - start))
    tokens, documents = source.read(start, length)
    assert (tokens.dtype, documents.dtype) == (np.int64, np.int32)
    assert (tokens.tolist(), documents.tolist()) == parts.span(start, length)


def test_a_source_without_shards_is_one(tmp_path: Path, prepared: Any) -> None:
    np.arange(5, dtype=np.uint16).tofile(tmp_path / "a.bin")
    whole = MdsSource(prepared.folder)
    for source in (TokenFileSource(tmp_path / "a.bin"), SyntheticSource(64, 1000), SpanSource(whole, 1, 3)):
        assert source.shards.tolist() == [0, source.num_tokens]
        source.fetch(0, 3)
        with pytest.raises(IndexError):
            source.fetch(source.num_tokens, 1)


def test_the_shards_of_a_part_are_those_it_touches(parts: Parts) -> None:
    whole = MdsSource(parts.folder)
    edges = whole.shards.tolist()
    part = SpanSource(whole, edges[1] + 7, edges[4] - edges[1])
    assert part.shards.tolist() == [0, *(edge - edges[1] - 7 for edge in edges[2:5]), part.num_tokens]
