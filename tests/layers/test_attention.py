"""Sliding-window attention equals softmax over an explicit mask, token by token."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from titans_dist.layers.attention import rotary, window_attention


def reference(q: Tensor, k: Tensor, v: Tensor, window: int, prefix: tuple[Tensor, Tensor] | None) -> Tensor:
    """One query at a time: the prefix, then the last `window` tokens including the query's own."""
    out = torch.zeros_like(q)
    batch, length, heads, dim = q.shape
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                first = max(0, t - window + 1)
                keys, values = k[b, first : t + 1, h], v[b, first : t + 1, h]
                if prefix is not None:
                    keys = torch.cat([prefix[0][0, :, h], keys])
                    values = torch.cat([prefix[1][0, :, h], values])
                out[b, t, h] = (keys @ q[b, t, h] / math.sqrt(dim)).softmax(0) @ values
    return out


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 2),
    length=st.integers(1, 19),
    heads=st.integers(1, 2),
    window=st.integers(1, 24),
    persistent=st.integers(0, 3),
)
def test_equals_one_query_at_a_time(batch: int, length: int, heads: int, window: int, persistent: int) -> None:
    torch.manual_seed(length * 31 + window)
    q, k, v = (torch.randn(batch, length, heads, 4, dtype=torch.float64) for _ in range(3))
    prefix = None
    if persistent:
        prefix = (torch.randn(1, persistent, heads, 4).double(), torch.randn(1, persistent, heads, 4).double())
    found = window_attention(q, k, v, window, prefix)
    torch.testing.assert_close(found, reference(q, k, v, window, prefix), rtol=1e-12, atol=1e-12)


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    rows = 9
    turned_q = rotary(q.expand(1, rows, 1, 4), 10000.0)[0, :, 0]
    turned_k = rotary(k.expand(1, rows, 1, 4), 10000.0)[0, :, 0]
    scores = turned_q @ turned_k.T
    for distance in range(rows):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-6)
    assert not torch.isclose(scores[0, 0], scores[3, 0])
