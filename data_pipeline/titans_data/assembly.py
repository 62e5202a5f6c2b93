"""The finished dataset: the shards of all parts under one index and one card."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from titans_data.card import (
    SPLITS,
    TOKENIZER_FOLDER,
    CorpusCounts,
    DatasetCard,
    PrepareOptions,
    ShardCard,
    SplitCard,
    dataset_fingerprint,
    describe_file,
)
from titans_data.errors import DataError
from titans_data.pages import read_index, write_index
from titans_data.stages import storage_dtype
from titans_data.tokenize import Tokenizer
from titans_data.work import link, sync, sync_tree

Finished = tuple[Path, dict[str, Any]]
"""The folder of a tokenized part and its report."""


def assemble(
    folder: Path, options: PrepareOptions, tokenizer: Tokenizer, counts: CorpusCounts, parts: Sequence[Finished]
) -> DatasetCard:
    """Write a dataset to `folder`, which is emptied, out of hard links to the shards of its parts in corpus order."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    splits = {split: _assemble_split(folder, split, parts) for split in SPLITS}
    if not splits["train"].documents:
        raise DataError(
            f"all {counts.documents} documents of {options.source or options.format} fell into the validation split: "
            f"lower validation_fraction from {options.validation_fraction} or give more documents"
        )
    tokenizer.save(folder / TOKENIZER_FOLDER)
    card = DatasetCard(
        options=options,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
        dtype=storage_dtype(tokenizer),
        page_tokens=options.page_tokens,
        counts=counts,
        splits=splits,
        fingerprint=dataset_fingerprint(tokenizer.fingerprint, splits),
    )
    card.write(folder)
    _sync(folder)
    return card


def _assemble_split(folder: Path, split: str, parts: Iterable[Finished]) -> SplitCard:
    (folder / split).mkdir()
    entries: list[dict[str, Any]] = []
    shards: list[ShardCard] = []
    documents = tokens = size = 0
    for number, (place, report) in enumerate(parts):
        content = report["splits"][split]
        if not content["shards"]:
            continue
        documents += content["documents"]
        tokens += content["tokens"]
        size += content["bytes"]
        name = f"{number:05}"
        (folder / split / name).mkdir()
        for entry in read_index(place / split):
            basename = entry["raw_data"]["basename"]
            link(place / split / basename, folder / split / name / basename)
            entries.append(entry | {"raw_data": entry["raw_data"] | {"basename": f"{name}/{basename}"}})
        cards = [ShardCard(**shard) for shard in content["shards"]]
        shards += [replace(card, name=f"{split}/{name}/{card.name}") for card in cards]
    write_index(folder / split, entries)
    return SplitCard(documents, tokens, size, describe_file(folder, f"{split}/index.json"), tuple(shards))


def _sync(folder: Path) -> None:
    """The shards are on the disk since their part was finished; what is new is small."""
    for split in SPLITS:
        for below in (folder / split).iterdir():
            sync(below)
        sync(folder / split)
    sync_tree(folder / TOKENIZER_FOLDER)
    for below in folder.iterdir():
        sync(below)
    sync(folder)
