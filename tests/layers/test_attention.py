"""Attention equals softmax over an explicit mask, token by token."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from titans_dist.layers.attention import causal_attention, window_attention
from titans_dist.layers.rotary import positions, rotary


def reference(
    q: Tensor, k: Tensor, v: Tensor, window: int, prefix: tuple[Tensor, Tensor] | None, document: Tensor | None
) -> Tensor:
    """One query at a time: the prefix, then those of the last `window` tokens that are of its document."""
    out = torch.zeros_like(q)
    batch, length, heads, dim = q.shape
    before = k.shape[1] - length
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                last = before + t
                seen = range(max(0, last - window + 1), last + 1)
                if document is not None:
                    seen = [s for s in seen if document[b, s] == document[b, last]]  # type: ignore[assignment]
                own = h * k.shape[2] // heads  # consecutive queries share keys and values
                keys, values = k[b, list(seen), own], v[b, list(seen), own]
                if prefix is not None:
                    keys = torch.cat([prefix[0][0, :, own], keys])
                    values = torch.cat([prefix[1][0, :, own], values])
                out[b, t, h] = (keys @ q[b, t, h] / math.sqrt(dim)).softmax(0) @ values
    return out


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 2),
    length=st.integers(1, 15),
    before=st.integers(0, 7),
    window=st.integers(1, 24),
    persistent=st.integers(0, 2),
    packed=st.booleans(),
    kv_heads=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 100),
)
def test_equals_one_query_at_a_time(
    batch: int, length: int, before: int, window: int, persistent: int, packed: bool, kv_heads: int, seed: int
) -> None:
    torch.manual_seed(seed)
    q = torch.randn(batch, length, 4, 4, dtype=torch.float64)
    k, v = (torch.randn(batch, before + length, kv_heads, 4, dtype=torch.float64) for _ in range(2))
    prefix = None
    if persistent:
        prefix = (torch.randn(1, persistent, kv_heads, 4).double(), torch.randn(1, persistent, kv_heads, 4).double())
    document = (torch.rand(batch, before + length) < 0.3).cumsum(1) - 1 if packed else None
    found = window_attention(q, k, v, window, prefix, document)
    torch.testing.assert_close(found, reference(q, k, v, window, prefix, document), rtol=1e-12, atol=1e-12)
    found = causal_attention(q, k, v, prefix, document)
    torch.testing.assert_close(found, reference(q, k, v, 99, prefix, document), rtol=1e-12, atol=1e-12)


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    rows = 9
    place = torch.arange(rows)[None]
    turned_q = rotary(q.expand(1, rows, 1, 4), 10000.0, place)[0, :, 0]
    turned_k = rotary(k.expand(1, rows, 1, 4), 10000.0, place)[0, :, 0]
    scores = turned_q @ turned_k.T
    for distance in range(rows):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-12, atol=1e-12)
    assert not torch.isclose(scores[0, 0], scores[3, 0])


def test_rotary_is_as_exact_after_a_million_tokens_in_float32() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8)
    near, far = torch.arange(5)[None], torch.arange(1_000_000, 1_000_005)[None]
    scores = [
        torch.einsum("bthd,bshd->bhts", rotary(q, 10000.0, place), rotary(k, 10000.0, place)) for place in (near, far)
    ]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-5)


def test_positions_count_from_each_document_s_first_token() -> None:
    starts = torch.tensor([[0, 0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]]).bool()
    found = positions(7, torch.tensor([5, 9, 2]), starts)
    assert found.tolist() == [[5, 6, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6], [2, 3, 4, 5, 6, 7, 8]]
    assert positions(3, torch.tensor([4, 0]), None).tolist() == [[4, 5, 6], [0, 1, 2]]
