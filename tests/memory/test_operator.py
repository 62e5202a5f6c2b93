"""The chunked operator and the token-by-token recurrence equal autograd on the paper's formulas, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.memory.oracle import Case, random_case, run
from titans_dist.memory import MemorySpec, MemoryState, initial_state, neural_memory
from titans_dist.memory.naive import recurrence

EXACT = 1e-10


def chunked(case: Case, spec: MemorySpec, chunk_size: int, read: str = "after") -> tuple[Tensor, MemoryState]:
    return neural_memory(
        case.q,
        case.k,
        case.v,
        spec=spec,
        weights=case.weights,
        alpha=case.alpha,
        eta=case.eta,
        theta=case.theta,
        norm=(case.gain, case.bias),
        chunk_size=chunk_size,
        read=read,
    )


def token_by_token(case: Case, spec: MemorySpec, chunk_size: int, read: str = "after") -> tuple[Tensor, MemoryState]:
    q, k, v, alpha, eta, theta = (x.transpose(1, 2) for x in case.tensors()[:6])
    y, state = recurrence(
        spec,
        q,
        k,
        v,
        alpha,
        eta if spec.momentum else None,
        theta,
        (case.gain.unsqueeze(1), case.bias.unsqueeze(1)),
        initial_state(spec, case.weights, case.q.shape[0]),
        chunk_size,
        read,
    )
    return y.transpose(1, 2), state


def oracle(case: Case, spec: MemorySpec, chunk_size: int, read: str = "after") -> tuple[Tensor, MemoryState]:
    y, weights, momentum = run(
        case,
        activation=spec.activation,
        residual=spec.residual,
        momentum=spec.momentum,
        chunk_size=chunk_size,
        read=read,
    )
    return y, MemoryState(weights, momentum if spec.momentum else [])


def assert_equal(found: tuple[Tensor, MemoryState], wanted: tuple[Tensor, MemoryState]) -> None:
    pairs = [(found[0], wanted[0])]
    pairs += zip(found[1].weights, wanted[1].weights, strict=True)
    pairs += zip(found[1].momentum, wanted[1].momentum, strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)


def gradients(case: Case, result: tuple[Tensor, MemoryState]) -> list[Tensor | None]:
    """Gradients of a fixed random projection of everything the operator returns."""
    y, state = result
    g = torch.Generator().manual_seed(99)
    total = sum(
        (x * torch.randn(x.shape, generator=g, dtype=x.dtype)).sum() for x in (y, *state.weights, *state.momentum)
    )
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, case.tensors(), allow_unused=True))


@pytest.mark.parametrize("form", [chunked, token_by_token], ids=["chunked", "recurrence"])
@pytest.mark.parametrize("read", ["after", "before"])
@pytest.mark.parametrize("chunk_size", [1, 4, 11, 64])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_outputs_and_state_equal_autograd(depth: int, residual: bool, chunk_size: int, read: str, form) -> None:
    spec = MemorySpec(depth=depth, expansion=2, residual=residual)
    case = random_case(2, 11, 2, 4, spec.shapes(4), seed=depth)
    assert_equal(form(case, spec, chunk_size, read), oracle(case, spec, chunk_size, read))


@pytest.mark.parametrize("momentum", [True, False], ids=["momentum", "no_momentum"])
@pytest.mark.parametrize("activation", ["gelu", "silu", "relu", "identity"])
def test_every_activation_and_algorithm(activation: str, momentum: bool) -> None:
    spec = MemorySpec(depth=2, expansion=3, activation=activation, momentum=momentum)
    case = random_case(1, 9, 2, 4, spec.shapes(4), seed=7)
    assert_equal(chunked(case, spec, 4), oracle(case, spec, 4))


@pytest.mark.parametrize("read", ["after", "before"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_gradients_of_every_input_equal_autograd_through_the_recurrence(residual: bool, read: str) -> None:
    spec = MemorySpec(depth=2, expansion=2, residual=residual)
    case = random_case(1, 7, 2, 4, spec.shapes(4), seed=3)
    found = gradients(case, chunked(case, spec, 3, read))
    wanted = gradients(case, oracle(case, spec, 3, read))
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 13),
    heads=st.integers(1, 3),
    dim=st.integers(1, 5),
    chunk_size=st.integers(1, 16),
    depth=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_chunk_size(
    batch: int, length: int, heads: int, dim: int, chunk_size: int, depth: int, seed: int
) -> None:
    # The plain memory: LayerNorm over one or two features amplifies rounding without bound.
    spec = MemorySpec(depth=depth, expansion=2, residual=False)
    case = random_case(batch, length, heads, dim, spec.shapes(dim), seed)
    assert_equal(chunked(case, spec, chunk_size), oracle(case, spec, chunk_size))


@settings(max_examples=20, deadline=None)
@given(chunks_before=st.integers(1, 3), chunk_size=st.integers(1, 5), rest=st.integers(1, 9))
def test_a_state_carries_over_a_chunk_border(chunks_before: int, chunk_size: int, rest: int) -> None:
    spec = MemorySpec(depth=2, expansion=2)
    cut = chunks_before * chunk_size
    case = random_case(2, cut + rest, 2, 4, spec.shapes(4), seed=5)

    def part(rows: slice, state: MemoryState | None) -> tuple[Tensor, MemoryState]:
        return neural_memory(
            case.q[:, rows],
            case.k[:, rows],
            case.v[:, rows],
            spec=spec,
            weights=case.weights,
            alpha=case.alpha[:, rows],
            eta=case.eta[:, rows],
            theta=case.theta[:, rows],
            norm=(case.gain, case.bias),
            state=state,
            chunk_size=chunk_size,
        )

    first, state = part(slice(0, cut), None)
    second, state = part(slice(cut, None), state)
    assert_equal((torch.cat([first, second], 1), state), chunked(case, spec, chunk_size))


def test_causality_is_exact() -> None:
    spec = MemorySpec()
    case = random_case(1, 12, 2, 4, spec.shapes(4), seed=1)
    y, _ = chunked(case, spec, 4)
    for j in (0, 5, 11):
        for name in ("q", "k", "v", "alpha", "eta", "theta"):
            changed = random_case(1, 12, 2, 4, spec.shapes(4), seed=1)
            with torch.no_grad():
                getattr(changed, name)[:, j] *= 0.5
            other, _ = chunked(changed, spec, 4)
            assert torch.equal(y[:, :j], other[:, :j])
            assert not torch.equal(y, other) or (name == "eta" and j == 0)  # S_0 = 0: the first eta acts on nothing


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("gate", ["alpha", "eta", "theta"])
def test_gates_at_their_limits_are_exact_and_have_finite_gradients(gate: str, value: float) -> None:
    spec = MemorySpec(depth=2, expansion=2, residual=False)
    case = random_case(1, 8, 1, 4, spec.shapes(4), seed=2)
    scale = 0.01 if gate == "theta" else 1.0
    with torch.no_grad():
        getattr(case, gate)[:, 2:5] = value * scale
    result = chunked(case, spec, 4)
    assert_equal(result, oracle(case, spec, 4))
    assert all(g is None or g.isfinite().all() for g in gradients(case, result))


def test_long_chunks_with_strong_forgetting_do_not_underflow() -> None:
    """Quotients of cumulative products would be 0 / 0 here: 0.5^256 is below float32's range."""
    spec = MemorySpec(depth=1, residual=False)
    case = random_case(1, 256, 1, 4, spec.shapes(4), seed=4)
    with torch.no_grad():
        case.alpha.fill_(0.5)
    wanted, _ = token_by_token(case, spec, 256)
    single = Case(*(t.detach().float() for t in case.tensors()[:6]), [case.weights[0].detach().float()],
                  case.gain.detach().float(), case.bias.detach().float())  # fmt: skip
    found, _ = chunked(single, spec, 256)
    torch.testing.assert_close(found, wanted.detach().float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_is_float32_and_the_output_has_the_dtype_of_q(dtype: torch.dtype) -> None:
    spec = MemorySpec()
    case = random_case(1, 6, 2, 4, spec.shapes(4), seed=1)
    args = [t.detach().to(dtype) for t in case.tensors()]
    low = Case(*args[:6], args[6:-2], args[-2], args[-1])
    y, state = chunked(low, spec, 4)
    assert y.dtype == dtype
    assert all(x.dtype == torch.float32 for x in state.weights + state.momentum)
    wanted, _ = chunked(case, spec, 4)
    torch.testing.assert_close(y.double(), wanted.detach(), rtol=0, atol=1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": torch.zeros(1, 3, 2, 4)}, "k has shape (1, 3, 2, 4)"),
        ({"alpha": torch.zeros(1, 6)}, "alpha has shape (1, 6)"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"read": "during"}, "read='during'"),
        ({"norm": None}, "norm is missing"),
        ({"eta": None}, "eta is missing"),
        ({"weights": [torch.zeros(2, 4, 4)]}, "the spec asks for"),
    ],
)
def test_errors_name_the_argument(change: dict, words: str) -> None:
    spec = MemorySpec()
    case = random_case(1, 6, 2, 4, spec.shapes(4), seed=1)
    arguments = dict(
        q=case.q, k=case.k, v=case.v, spec=spec, weights=case.weights, alpha=case.alpha, eta=case.eta,
        theta=case.theta, norm=(case.gain, case.bias), chunk_size=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match=words.replace("(", r"\(").replace(")", r"\)")):
        neural_memory(**{**arguments, **change})
