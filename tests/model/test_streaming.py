"""A sequence in any number of calls is the sequence in one: logits and state."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.model.models import CHUNK, MODELS, SEGMENT, model, tokens
from titans_dist.model import ModelState, flatten

LENGTH = 27


def in_parts(name: str, x: Tensor, borders: list[int], starts: Tensor | None = None) -> tuple[Tensor, ModelState]:
    """The logits of all parts together, and the last state."""
    state, found = model(name).initial_state(x.shape[0]), []
    for first, last in zip([0, *borders], [*borders, x.shape[1]], strict=True):
        part = None if starts is None else starts[:, first:last]
        logits, state = model(name)(x[:, first:last], state=state, starts=part)
        found.append(logits)
    return torch.cat(found, 1), state


def assert_same_state(a: ModelState, b: ModelState) -> None:
    torch.testing.assert_close(flatten(a), flatten(b), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_one_token_at_a_time_is_one_pass(name: str) -> None:
    x = tokens(2, LENGTH)
    logits, state = in_parts(name, x, list(range(1, LENGTH)))
    whole, last = in_parts(name, x, [])
    torch.testing.assert_close(model(name)(x), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(logits, whole, rtol=1e-10, atol=1e-10)
    assert_same_state(state, last)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=4, deadline=None)
@given(borders=st.sets(st.integers(1, LENGTH - 1), min_size=1, max_size=5))
@torch.no_grad()
def test_any_split_is_one_pass(name: str, borders: set[int]) -> None:
    x = tokens(1, LENGTH, seed=3)
    logits, state = in_parts(name, x, sorted(borders))
    whole, last = in_parts(name, x, [])
    torch.testing.assert_close(logits, whole, rtol=1e-10, atol=1e-10)
    assert_same_state(state, last)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("borders", [[5, 6, 19], [8, 16], list(range(1, LENGTH))], ids=["odd", "segments", "tokens"])
@torch.no_grad()
def test_documents_may_begin_anywhere_in_any_split(name: str, borders: list[int]) -> None:
    x, starts = tokens(2, LENGTH), torch.zeros(2, LENGTH, dtype=torch.bool)
    starts[0, [0, 3, 16]] = True
    starts[1, [6, 7, 19]] = True
    logits, state = in_parts(name, x, borders, starts)
    whole, last = in_parts(name, x, [], starts)
    torch.testing.assert_close(model(name)(x, starts=starts), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(logits, whole, rtol=1e-10, atol=1e-10)
    assert_same_state(state, last)


@pytest.mark.parametrize("name", ["mag", "mal", "mac", "lmm_memora", "lmm_tnt", "gated_deltanet"])
def test_gradients_flow_through_the_state(name: str) -> None:
    """Two calls without a detach in between have the gradients of one."""
    x, chosen = tokens(1, 14), model(name)
    target = torch.randn(1, 14, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    parameters = list(chosen.parameters())
    whole = torch.autograd.grad((chosen(x) * target).sum(), parameters)
    halves = torch.autograd.grad((in_parts(name, x, [6])[0] * target).sum(), parameters)
    for a, b in zip(whole, halves, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["mag", "mac", "lmm_tnt"])
def test_a_detached_state_ends_the_gradient(name: str) -> None:
    x, chosen = tokens(1, 12), model(name)
    _, state = chosen(x[:, :6], state=chosen.initial_state(1))
    cut = state.detach()
    assert any(value.requires_grad for value in flatten(state).values())
    assert not any(value.requires_grad for value in flatten(cut).values())
    torch.testing.assert_close(flatten(cut), {k: v.detach() for k, v in flatten(state).items()})
    assert torch.equal(chosen(x[:, 6:], state=cut)[0], chosen(x[:, 6:], state=state)[0])


def size(state: ModelState) -> int:
    return sum(value.numel() for value in flatten(state).values())


@pytest.mark.parametrize("name", [name for name in MODELS if name != "transformer"])
@torch.no_grad()
def test_the_state_has_one_size(name: str) -> None:
    chosen, state = model(name), model(name).initial_state(1)
    fresh = size(state)
    sizes = []
    for _ in range(3):
        state = chosen(tokens(1, 3 * CHUNK * SEGMENT), state=state)[1]
        sizes.append(size(state))
    assert sizes == [fresh] * 3


@torch.no_grad()
def test_only_full_attention_grows() -> None:
    chosen, state = model("transformer"), model("transformer").initial_state(1)
    fresh = size(state)
    grown = size(chosen(tokens(1, 10), state=state)[1])
    per_token = chosen.config.num_layers * (2 * chosen.config.hidden_size + 1)
    assert grown - fresh == 10 * per_token
