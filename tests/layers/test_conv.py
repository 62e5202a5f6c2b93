"""The causal convolution equals its sum, and knows the tokens before a sequence."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_dist.layers.conv import CausalConv


def conv(channels: int, kernel: int) -> CausalConv:
    layer = CausalConv(channels, kernel).double()
    torch.manual_seed(0)
    with torch.no_grad():
        layer.weight.normal_()
    return layer


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 9), kernel=st.integers(1, 5))
def test_each_token_is_a_weighted_sum_of_the_last_kernel_tokens(length: int, kernel: int) -> None:
    layer, x = conv(3, kernel), torch.randn(2, length, 3, dtype=torch.float64)
    y = layer(x)
    for t in range(length):
        wanted = sum(layer.weight[:, kernel - 1 - back] * x[:, t - back] for back in range(kernel) if t - back >= 0)
        torch.testing.assert_close(y[:, t], wanted)


@settings(max_examples=25, deadline=None)
@given(before=st.integers(1, 7), length=st.integers(1, 5), kernel=st.integers(1, 5))
def test_the_past_counts_as_if_it_were_one_sequence(before: int, length: int, kernel: int) -> None:
    layer, whole = conv(3, kernel), torch.randn(1, before + length, 3, dtype=torch.float64)
    torch.testing.assert_close(layer(whole[:, before:], past=whole[:, :before]), layer(whole)[:, before:])
