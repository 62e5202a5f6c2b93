"""What a plan says of kernels is what the operator says of them."""

from __future__ import annotations

import itertools

import torch

from titans_dist.config import MemoryConfig
from titans_dist.memory.chunked import GROUP_TOKENS
from titans_dist.plan import place
from titans_kernels import launch
from titans_kernels.memory import unsupported

DTYPES = {2: torch.bfloat16, 4: torch.float32}


def test_groups_and_segments_are_the_operators() -> None:
    assert place.GROUP_TOKENS == GROUP_TOKENS
    assert (place.WORKSPACE_BYTES, place.HIDDEN_KINDS) == (launch.WORKSPACE_BYTES, launch.HIDDEN_KINDS)


def test_the_same_sizes_have_kernels() -> None:
    for depth, dim, chunk, width, bias in itertools.product(
        (1, 2, 3), (32, 64, 96, 128, 256), (16, 32, 64, 128, 256), (2, 4), ("l2", "huber", "lp")
    ):
        memory = MemoryConfig(preset="titans", depth=depth, chunk_size=chunk, bias=bias)
        missing = unsupported(DTYPES[width], dim, depth, chunk, "gelu", bias, "after")
        assert (place.no_memory_kernels(memory, dim, width) is None) == (missing is None), (depth, dim, chunk, missing)
