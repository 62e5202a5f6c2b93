"""The causal convolution equals its sum, knows the tokens before a sequence, and keeps documents apart."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from titans_dist.layers.conv import CausalConv


def conv(channels: int, kernel: int) -> CausalConv:
    layer = CausalConv(channels, kernel).double()
    torch.manual_seed(0)
    with torch.no_grad():
        layer.weight.normal_()
    return layer


def by_hand(layer: CausalConv, past: Tensor, x: Tensor) -> Tensor:
    """One token at a time: the weighted sum of the last `kernel` tokens of past (K - 1, C) and x (T, C)."""
    kernel = layer.weight.shape[1]
    whole = torch.cat([past, x])
    rows = [sum(layer.weight[:, j] * whole[t + j] for j in range(kernel)) for t in range(x.shape[0])]
    return torch.stack(rows)  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 9), kernel=st.integers(1, 5))
def test_each_token_is_a_weighted_sum_of_the_last_kernel_tokens(length: int, kernel: int) -> None:
    layer, x = conv(3, kernel), torch.randn(2, length, 3, dtype=torch.float64)
    past = torch.randn(1, kernel - 1, 3, dtype=torch.float64)
    y, _ = layer(x, past)
    for row in range(2):
        torch.testing.assert_close(y[row], by_hand(layer, past[0], x[row]))


@settings(max_examples=25, deadline=None)
@given(before=st.integers(1, 7), length=st.integers(1, 5), kernel=st.integers(1, 5))
def test_two_calls_are_one(before: int, length: int, kernel: int) -> None:
    layer, whole = conv(3, kernel), torch.randn(1, before + length, 3, dtype=torch.float64)
    y, last = layer(whole, layer.no_past())
    _, tail = layer(whole[:, :before], layer.no_past())
    again, other = layer(whole[:, before:], tail)
    torch.testing.assert_close(again, y[:, before:])
    assert torch.equal(last, other)


@settings(max_examples=40, deadline=None)
@given(
    kernel=st.integers(1, 5),
    starts=st.lists(st.booleans(), min_size=1, max_size=9),
    border=st.integers(0, 9),
)
def test_documents_are_convolved_each_by_itself(kernel: int, starts: list[bool], border: int) -> None:
    """The first tokens of each see what a sequence's first tokens see; the running one goes on from its past."""
    layer, length = conv(3, kernel), len(starts)
    x = torch.randn(1, length, 3, dtype=torch.float64)
    begin, past = (torch.randn(1, kernel - 1, 3, dtype=torch.float64) for _ in range(2))
    firsts = [0, *(t for t in range(length) if starts[t]), length]
    parts = []
    for first, last in pairwise(firsts):
        if last > first:
            before = past if first == 0 and not starts[0] else begin
            parts.append(by_hand(layer, before[0], x[0, first:last]))
    wanted = torch.cat(parts)
    given_starts = torch.tensor([starts])
    y, tail = layer(x, past, given_starts, begin)
    torch.testing.assert_close(y[0], wanted)
    border = min(border, length - 1)
    if border:  # and the same in two calls
        a, middle = layer(x[:, :border], past, given_starts[:, :border], begin)
        b, last = layer(x[:, border:], middle, given_starts[:, border:], begin)
        torch.testing.assert_close(torch.cat([a, b], 1), y)
        torch.testing.assert_close(last, tail)
