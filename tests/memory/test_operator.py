"""The chunked operator and the token-by-token recurrence equal autograd on Titans' formulas, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.memory import oracle
from tests.memory.cases import Case, assert_equal, assert_equal_gradients, gradients, operator, random_case
from titans_dist.memory import MemorySpec, initial_state


@pytest.mark.parametrize("backend", ["torch", "recurrent"])
@pytest.mark.parametrize("read", ["after", "before"])
@pytest.mark.parametrize("chunk_size", [1, 4, 11, 64])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_outputs_and_state_equal_autograd(depth: int, residual: bool, chunk_size: int, read: str, backend: str) -> None:
    spec = MemorySpec(depth=depth, expansion=2, residual=residual)
    case = random_case(spec, 2, 11, 2, 4, seed=depth)
    assert_equal(operator(spec, case, chunk_size, read, backend=backend), oracle.run(spec, case, chunk_size, read))


@pytest.mark.parametrize("backend", ["torch", "recurrent"])
@pytest.mark.parametrize("momentum", [True, False], ids=["momentum", "no_momentum"])
@pytest.mark.parametrize("activation", ["gelu", "silu", "relu", "identity"])
def test_every_activation_and_algorithm(activation: str, momentum: bool, backend: str) -> None:
    spec = MemorySpec(depth=2, expansion=3, activation=activation, momentum=momentum)
    case = random_case(spec, 1, 9, 2, 4, seed=7)
    found, wanted = operator(spec, case, 4, backend=backend), oracle.run(spec, case, 4)
    assert_equal(found, wanted)
    assert_equal_gradients(gradients(case, found), gradients(case, wanted))


@pytest.mark.parametrize("backend", ["torch", "recurrent"])
@pytest.mark.parametrize("read", ["after", "before"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_gradients_of_every_input_equal_autograd_through_the_recurrence(
    depth: int, residual: bool, read: str, backend: str
) -> None:
    spec = MemorySpec(depth=depth, expansion=2, residual=residual)
    case = random_case(spec, 1, 7, 2, 4, seed=3)
    found = gradients(case, operator(spec, case, 3, read, backend=backend))
    assert_equal_gradients(found, gradients(case, oracle.run(spec, case, 3, read)))


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 13),
    heads=st.integers(1, 3),
    dim=st.integers(1, 5),
    chunk_size=st.integers(1, 16),
    depth=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_chunk_size(
    batch: int, length: int, heads: int, dim: int, chunk_size: int, depth: int, seed: int
) -> None:
    # The plain memory: LayerNorm over one or two features amplifies rounding without bound.
    spec = MemorySpec(depth=depth, expansion=2, residual=False)
    case = random_case(spec, batch, length, heads, dim, seed)
    with torch.no_grad():
        case.theta.mul_(0.3)  # deep memories with a step too large amplify it as well
    assert_equal(operator(spec, case, chunk_size), oracle.run(spec, case, chunk_size))


def test_one_norm_for_all_heads() -> None:
    spec = MemorySpec(expansion=2)
    case = random_case(spec, 2, 7, 2, 4, seed=6)
    gain, bias = case.gain[0], case.bias[0]
    for backend in ("torch", "recurrent"):
        found = operator(spec, case, 3, norm=(gain, bias), backend=backend)
        assert_equal(found, operator(spec, case, 3, norm=(gain.expand(2, 4), bias.expand(2, 4))))


def test_the_initial_state_is_where_a_sequence_without_one_begins() -> None:
    spec = MemorySpec(expansion=2)
    case = random_case(spec, 3, 7, 2, 4, seed=8)
    state = initial_state(spec, case.weights, 3)
    assert [x.shape for x in state.weights] == [(3, 2, 4, 8), (3, 2, 8, 4)]
    assert all(not x.count_nonzero() for x in state.momentum) and len(state.momentum) == 2
    assert_equal(operator(spec, case, 3, state=state), operator(spec, case, 3), 0)


@pytest.mark.parametrize("backend", ["torch", "recurrent"])
@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("gate", ["alpha", "eta", "theta"])
def test_gates_at_their_limits_are_exact_and_have_finite_gradients(gate: str, value: float, backend: str) -> None:
    spec = MemorySpec(depth=2, expansion=2, residual=False)
    case = random_case(spec, 1, 8, 1, 4, seed=2)
    scale = 0.01 if gate == "theta" else 1.0
    with torch.no_grad():
        getattr(case, gate)[:, 2:5] = value * scale
    result = operator(spec, case, 4, backend=backend)
    assert_equal(result, oracle.run(spec, case, 4))
    assert all(g is None or g.isfinite().all() for g in gradients(case, result))


def test_long_chunks_with_strong_forgetting_do_not_underflow() -> None:
    """Quotients of cumulative products would be 0 / 0 here: 0.5^256 is below float32's range."""
    spec = MemorySpec(depth=1, residual=False)
    case = random_case(spec, 1, 256, 1, 4, seed=4)
    with torch.no_grad():
        case.alpha.fill_(0.5)
    wanted, _ = operator(spec, case, 256, backend="recurrent")
    tensors = [t.detach().float() for t in case.tensors()]
    found, _ = operator(spec, Case(*tensors[:7], tensors[7:8], *tensors[8:]), 256)  # type: ignore[arg-type]
    torch.testing.assert_close(found, wanted.detach().float(), rtol=1e-4, atol=1e-5)
