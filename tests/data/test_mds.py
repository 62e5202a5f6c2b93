"""Reading pages from MDS shards: what streaming's own reader says of the same bytes, and nothing else."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_data._imports import import_streaming
from titans_data.mds import has_layout, parse_page, read_sample
from titans_data.pages import column_types


def write_pages(folder: Path, dtype: np.dtype, pages: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """One shard of the pages by streaming's writer; its index entry."""
    with import_streaming().MDSWriter(out=str(folder), columns=column_types(dtype)) as writer:
        for tokens, starts in pages:
            writer.write({"tokens": tokens, "starts": starts.astype("<i4").tobytes()})
    (entry,) = json.loads((folder / "index.json").read_text())["shards"]
    return dict(entry)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), name=st.sampled_from(["uint16", "uint32"]))
def test_pages_are_read_as_streaming_reads_them(
    data: st.DataObject, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Lengths whose shape takes one, two and four bytes."""
    dtype = np.dtype(name)
    lengths = data.draw(st.lists(st.sampled_from([1, 2, 255, 256, 65535, 65536]) | st.integers(1, 600), min_size=1))
    random = np.random.default_rng(len(lengths))
    pages = []
    for length in lengths:
        starts = np.unique(random.integers(0, length, data.draw(st.integers(0, 5))))
        pages.append((random.integers(0, np.iinfo(dtype).max, length).astype(dtype), starts))
    folder = tmp_path_factory.mktemp("mds")
    entry = write_pages(folder, dtype, pages)
    assert has_layout(entry, dtype)

    path = folder / entry["raw_data"]["basename"]
    descriptor = os.open(path, os.O_RDONLY)
    for number, sample in enumerate(import_streaming().LocalDataset(str(folder))):
        ours = parse_page(read_sample(descriptor, number, path.stat().st_size), dtype)
        for mine, theirs, written in zip(
            ours, (sample["tokens"], np.frombuffer(sample["starts"], "<i4")), pages[number], strict=True
        ):
            assert mine.dtype == theirs.dtype
            assert mine.tolist() == theirs.tolist() == written.tolist()
    os.close(descriptor)


@settings(max_examples=300, deadline=None)
@given(sample=st.binary(max_size=60), cut=st.integers(0, 40), name=st.sampled_from(["uint16", "uint32"]))
def test_what_is_no_page_is_a_value_error(sample: bytes, cut: int, name: str) -> None:
    """Of random bytes and of a page that is cut short."""
    page = bytes([4, 0, 0, 0, 22, 0, 0, 0, 3, 0, 0, 0, 4, 5]) + bytes(20)
    tokens, starts = parse_page(page, np.dtype("uint32"))
    assert (tokens.tolist(), starts.tolist()) == ([0] * 5, [3])
    with pytest.raises((ValueError, struct.error)):
        parse_page(page[:cut] if cut < len(page) else page + bytes(cut), np.dtype(name))
    try:
        tokens, starts = parse_page(sample, np.dtype(name))
    except (ValueError, struct.error):
        return
    assert tokens.nbytes + starts.nbytes < len(sample)


@pytest.mark.parametrize(
    "change",
    [
        {"compression": "zstd"},
        {"column_encodings": ["pkl", "ndarray:uint16"]},
        {"column_names": ["tokens", "starts"]},
        {"column_sizes": [None, 8]},
        {"format": "json"},
        {"version": 3},
    ],
)
def test_another_layout_is_not_taken_for_pages(change: dict[str, Any], tmp_path: Path) -> None:
    entry = write_pages(tmp_path, np.dtype("uint16"), [(np.arange(5, dtype=np.uint16), np.array([0]))])
    assert has_layout(entry, np.dtype("uint16"))
    assert not has_layout(entry, np.dtype("uint32"))
    assert not has_layout(entry | change, np.dtype("uint16"))
