"""Reading pages from an MDS shard: the few of streaming's formats that pages use, without its decoder's overhead.

A shard is uint32 n, then uint32 offsets (n + 1,) of its samples, then JSON, then the samples. A sample of the columns
`starts` (bytes) and `tokens` (ndarray:uint16 or uint32) is
    uint32 size of starts, uint32 size of tokens
    starts: int32 positions
    tokens: one byte (axes << 2 | log2 of the bytes of a length), the length, the values
and everything is little-endian.
"""

from __future__ import annotations

import os
import struct
from typing import Any

import numpy as np

_PAIR = struct.Struct("<2I")
# How the index of a split has to describe each shard for `parse_page` to be right.
_LAYOUT = {"version": 2, "format": "mds", "compression": None, "column_names": ["starts", "tokens"]}


def has_layout(entry: dict[str, Any], dtype: np.dtype) -> bool:
    """Whether an index entry describes a shard of pages whose tokens are stored as `dtype`."""
    layout = _LAYOUT | {"column_encodings": ["bytes", f"ndarray:{dtype.name}"], "column_sizes": [None, None]}
    return all(entry[name] == value for name, value in layout.items())


def read_sample(descriptor: int, number: int, size_bytes: int) -> bytes:
    """One sample of the shard of `size_bytes` that is open as `descriptor`. ValueError when it cannot be there."""
    begin, end = _PAIR.unpack(os.pread(descriptor, 8, 4 * (1 + number)))
    if not begin < end <= size_bytes:
        raise ValueError(f"it reaches from byte {begin} to byte {end} of {size_bytes}")
    return os.pread(descriptor, end - begin, begin)


def parse_page(sample: bytes, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """tokens (n,) of `dtype` and starts (k,) int32 of a sample, both read-only. ValueError when it is no page."""
    starts_size, tokens_size = _PAIR.unpack_from(sample)
    if 8 + starts_size + tokens_size != len(sample) or starts_size % 4 or tokens_size < 2:
        raise ValueError(f"parts of {starts_size} and {tokens_size} bytes in a sample of {len(sample)}")
    starts = np.frombuffer(sample, "<i4", starts_size // 4, 8)
    shape = 8 + starts_size
    kind = sample[shape]
    values = shape + 1 + (1 << (kind & 3))
    count = int.from_bytes(sample[shape + 1 : values], "little")
    if kind >> 2 != 1 or values + count * dtype.itemsize != len(sample):
        raise ValueError(f"{count} tokens along {kind >> 2} axes in {tokens_size} bytes")
    return np.frombuffer(sample, dtype, count, values), starts
