"""Every memory that MIRAS's four choices make equals token-by-token autograd, in both forms, in float64."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.memory import oracle
from tests.memory.cases import (
    KINDS,
    Case,
    Result,
    assert_equal,
    assert_equal_gradients,
    gradients,
    operator,
    random_case,
    random_state,
)
from titans_dist.memory import MemorySpec, MemoryState, neural_memory
from titans_dist.memory.bias import inner_loss, output_descent

BIASES = ["l2", "dot", "l1", "lp", "huber"]
RETENTIONS = ["none", "l2", "lq", "lq_paper", "kl", "elastic_net"]
BACKENDS = ["torch", "recurrent"]


@functools.cache
def case_and_oracle(spec: MemorySpec, chunk_size: int, read: str) -> tuple[Case, Result]:
    """One case and what autograd says, worked out once for all forms that are compared with it."""
    case = random_case(spec, 1, 9, 2, 3, seed=1)
    y, state = oracle.run(spec, case, chunk_size, read)
    assert max(x.abs().max() for x in (y, *state.weights)) < 100, (
        "the case diverges: rounding would be seen, not errors"
    )
    return case, (y, state)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk_size", [1, 4, 11])
@pytest.mark.parametrize("read", ["after", "before"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("retention", RETENTIONS)
@pytest.mark.parametrize("bias", BIASES)
def test_bias_and_retention_equal_autograd(
    bias: str, retention: str, depth: int, read: str, chunk_size: int, backend: str
) -> None:
    spec = MemorySpec(depth=depth, expansion=2, bias=bias, retention=retention, momentum=False, threshold=0.01)
    case, wanted = case_and_oracle(spec, chunk_size, read)
    assert_equal(operator(spec, case, chunk_size, read, backend=backend), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk_size", [1, 4, 9])
@pytest.mark.parametrize("read", ["after", "before"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("retention", RETENTIONS)
def test_momentum_goes_with_every_retention(
    retention: str, residual: bool, read: str, chunk_size: int, backend: str
) -> None:
    spec = MemorySpec(expansion=2, retention=retention, residual=residual, threshold=0.01)
    case, wanted = case_and_oracle(spec, chunk_size, read)
    assert_equal(operator(spec, case, chunk_size, read, backend=backend), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize("read", ["after", "before"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_preset_equals_autograd(kind: str, read: str, chunk_size: int, backend: str) -> None:
    case, wanted = case_and_oracle(KINDS[kind], chunk_size, read)
    assert_equal(operator(KINDS[kind], case, chunk_size, read, backend=backend), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("retention", ["none", "l2"])
@pytest.mark.parametrize("depth", [1, 2])
def test_channel_wise_gates(depth: int, retention: str, momentum: bool, backend: str) -> None:
    spec = MemorySpec(depth=depth, expansion=2, retention=retention, momentum=momentum, channel_wise=True, bias="huber")
    for read in ("after", "before"):
        case, wanted = case_and_oracle(spec, 4, read)
        assert_equal(operator(spec, case, 4, read, backend=backend), wanted)


@pytest.mark.parametrize("depth", [1, 2])
def test_channel_wise_gates_that_agree_are_gates_of_the_head(depth: int) -> None:
    spec = MemorySpec(depth=depth, expansion=2)
    case = random_case(spec, 1, 9, 2, 3, seed=2)
    wide = random_case(MemorySpec(depth=depth, expansion=2, channel_wise=True), 1, 9, 2, 3, seed=2)
    for name in ("q", "k", "v", "weights", "gain", "bias"):
        setattr(wide, name, getattr(case, name))
    for name in ("alpha", "eta", "theta"):
        setattr(wide, name, getattr(case, name).unsqueeze(-1).expand(-1, -1, -1, 3))
    found, wanted = operator(MemorySpec(depth=depth, expansion=2, channel_wise=True), wide, 4), operator(spec, case, 4)
    for a, b in zip((found[0], *found[1].weights, *found[1].momentum),
                    (wanted[0], *wanted[1].weights, *wanted[1].momentum), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("decay", ["after", "before"])
@pytest.mark.parametrize("bias", BIASES)
def test_gradients_at_the_tokens_own_memory(bias: str, decay: str, momentum: bool, depth: int, backend: str) -> None:
    spec = MemorySpec(depth=depth, expansion=2, bias=bias, anchor="token", decay=decay, momentum=momentum)
    case, wanted = case_and_oracle(spec, 1, "after")
    assert_equal(operator(spec, case, 1, backend=backend), wanted)


@pytest.mark.parametrize("read", ["after", "before"])
@pytest.mark.parametrize("kind", ["deltanet", "gated_deltanet", "longhorn", "token_decay_after", "implicit_gated"])
def test_the_chunk_size_is_invisible_where_each_token_has_its_own_gradient(kind: str, read: str) -> None:
    case, wanted = case_and_oracle(KINDS[kind], 1, read)
    for chunk_size in (2, 4, 9, 16):
        found = operator(KINDS[kind], case, chunk_size, read)
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found[1].weights, wanted[1].weights, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("retention", ["none", "l2", "lq", "lq_paper", "elastic_net"])
def test_read_start_sees_the_memory_that_the_chunk_began_with(retention: str, backend: str) -> None:
    spec = MemorySpec(expansion=2, retention=retention, threshold=0.01)
    case, wanted = case_and_oracle(spec, 4, "start")
    assert_equal(operator(spec, case, 4, "start", backend=backend), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", BIASES)
def test_powers_and_sharpness_are_those_of_the_spec(bias: str, backend: str) -> None:
    for retention in ("lq", "lq_paper"):
        spec = MemorySpec(expansion=2, bias=bias, retention=retention, p=2.5, q=3.0, sharpness=2.0, momentum=False)
        case, wanted = case_and_oracle(spec, 4, "after")
        assert_equal(operator(spec, case, 4, backend=backend), wanted)


def test_huber_cases_are_on_both_sides_of_delta() -> None:
    """Otherwise the tests of huber above would be tests of l2, or of one side."""
    spec = MemorySpec(depth=1, residual=False, bias="huber", momentum=False)
    case, _ = case_and_oracle(spec, 4, "after")
    e = torch.einsum("bthd,hde->bthe", case.k, case.weights[0]) - case.v
    assert 0.2 < (e.norm(dim=-1) > case.delta).double().mean() < 0.8


def test_huber_within_delta_is_l2_and_goes_on_without_a_jump() -> None:
    spec = MemorySpec(expansion=2, bias="huber", momentum=False)
    case = random_case(spec, 1, 9, 2, 3, seed=3)
    l2 = operator(MemorySpec(expansion=2, momentum=False), case, 4)
    assert_equal(operator(spec, case, 4, delta=torch.full_like(case.delta, 1e3)), l2)
    f = torch.zeros(1, 1, 1, 3, dtype=torch.float64)
    one = dict(
        spec=MemorySpec(depth=1, residual=False, bias="huber", retention="none", momentum=False),
        weights=[torch.zeros(1, 3, 3, dtype=torch.float64)], theta=torch.ones_like(f[..., 0]), chunk_size=1,
    )  # fmt: skip
    k = v = torch.tensor([2.0, -1.0, 2.0], dtype=torch.float64).expand(1, 1, 1, 3)  # ||e|| = 3
    inside, outside = (
        neural_memory(k, k, v, delta=torch.full((1, 1, 1), d, dtype=torch.float64), **one)[1].weights[0]  # type: ignore[arg-type]
        for d in (3 + 1e-12, 3 - 1e-12)
    )
    torch.testing.assert_close(inside, outside, rtol=0, atol=1e-10)


@pytest.mark.parametrize("bias", BIASES)
def test_the_inner_loss_that_is_reported_is_the_one_that_is_descended(bias: str) -> None:
    """l1 and lp descend smooth stand-ins: at a sharp sign, and away from 0, the same."""
    spec = MemorySpec(bias=bias, sharpness=1e3)
    case = random_case(spec, 1, 9, 2, 3, seed=16)
    f = case.q * 3
    loss = inner_loss(spec, f, case.v, case.delta)
    assert loss.shape == (1, 9, 2)
    (slope,) = torch.autograd.grad(loss.sum(), f)
    torch.testing.assert_close(slope, -output_descent(spec, f, case.v, case.delta), rtol=1e-3, atol=1e-3)


GRADIENT_KINDS = [
    "titans", "moneta", "yaad", "memora", "ttt_linear", "gated_deltanet", "longhorn", "mamba2", "l1", "lq", "dot_mlp",
    "lq_paper_momentum", "kl_momentum", "elastic_net", "channel_wise", "channel_wise_matrix", "implicit_gated", "plain",
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("read", ["after", "before"])
@pytest.mark.parametrize("kind", GRADIENT_KINDS)
def test_gradients_of_every_input_equal_autograd_through_the_recurrence(kind: str, read: str, backend: str) -> None:
    spec = KINDS[kind]
    case = random_case(spec, 1, 7, 2, 3, seed=4)
    found = gradients(case, operator(spec, case, 3, read, backend=backend))
    wanted = gradients(case, oracle.run(spec, case, 3 if spec.anchor == "chunk" else 1, read))
    assert_equal_gradients(found, wanted)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("bias", BIASES)
def test_gradients_of_every_bias(bias: str, depth: int, residual: bool) -> None:
    spec = MemorySpec(depth=depth, expansion=2, bias=bias, residual=residual, sharpness=3.0)
    case = random_case(spec, 1, 7, 2, 3, seed=12)
    found = gradients(case, operator(spec, case, 3))
    assert_equal_gradients(found, gradients(case, oracle.run(spec, case, 3)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["titans", "plain", "lq", "elastic_net", "channel_wise"])
def test_gradients_of_what_read_start_sees(kind: str, backend: str) -> None:
    spec = KINDS[kind]
    case = random_case(spec, 1, 7, 2, 3, seed=13)
    found = gradients(case, operator(spec, case, 3, "start", backend=backend))
    assert_equal_gradients(found, gradients(case, oracle.run(spec, case, 3, "start")))


@pytest.mark.parametrize("kind", ["titans", "yaad", "moneta", "memora", "gated_deltanet", "channel_wise"])
def test_gradients_of_the_outputs_alone_of_the_state_alone_and_at_some_inputs_only(kind: str) -> None:
    """A hand-written backward pass must not count on a gradient for everything, nor on being asked for all."""
    spec = KINDS[kind]
    case = random_case(spec, 1, 7, 2, 3, seed=14)
    found, wanted = operator(spec, case, 3), oracle.run(spec, case, 3)
    inputs = [case.k, case.v, case.theta, *case.weights]
    for pick in (lambda r: r[0], lambda r: r[1].weights[0], lambda r: (r[1].momentum or r[1].weights)[-1]):
        for at in (inputs, inputs[:1], inputs[-1:]):
            a, b = (torch.autograd.grad(pick(r).sin().sum(), at, retain_graph=True) for r in (found, wanted))
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for tensor in case.tensors():
        tensor.requires_grad_(False)
    case.v.requires_grad_()
    (alone,) = torch.autograd.grad(operator(spec, case, 3)[0].sin().sum(), case.v)
    (wanted_alone,) = torch.autograd.grad(wanted[0].sin().sum(), case.v)
    torch.testing.assert_close(alone, wanted_alone, rtol=1e-9, atol=1e-9)


def test_inputs_may_be_views_of_any_layout() -> None:
    spec = MemorySpec(expansion=2)
    case = random_case(spec, 2, 7, 2, 4, seed=15)
    wanted = operator(spec, case, 3)
    case.q, case.k, case.v = (x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for x in (case.q, case.k, case.v))
    case.theta = case.theta.transpose(0, 2).contiguous().transpose(0, 2)
    case.alpha = case.alpha[:, :1, :1].expand(2, 7, 2)
    constant = operator(spec, case, 3, alpha=case.alpha.contiguous())
    assert_equal(operator(spec, case, 3), constant, 1e-12)
    assert not torch.equal(constant[0], wanted[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["titans", "plain", "moneta", "lq", "memora", "gated_deltanet", "channel_wise"])
def test_a_given_state_is_where_the_sequence_begins_and_has_gradients(kind: str, backend: str) -> None:
    spec = KINDS[kind]
    case = random_case(spec, 2, 7, 2, 3, seed=5)
    case.state = random_state(spec, 2, 2, 3, seed=6)
    found, wanted = operator(spec, case, 3, backend=backend), oracle.run(spec, case, 3)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[1].weights, wanted[1].weights, rtol=1e-10, atol=1e-10)
    assert_equal_gradients(gradients(case, found), gradients(case, wanted))


@pytest.mark.parametrize("kind", ["titans", "plain", "moneta", "yaad", "memora", "gated_deltanet", "longhorn", "lq",
                                  "elastic_net", "channel_wise", "mamba2"])  # fmt: skip
def test_gradcheck(kind: str) -> None:
    """Finite differences: the one check that shares no derivative with the oracle."""
    spec = MemorySpec(**{**KINDS[kind].__dict__, "expansion": 1, "sharpness": 2.0})
    case = random_case(spec, 1, 3, 1, 3, seed=7)
    case.state = random_state(spec, 1, 1, 3, seed=8)
    names = ["q", "k", "v", "alpha", "eta", "theta", "delta", "gain", "bias"]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        changed = dict(zip(names, tensors, strict=False))
        rest = list(tensors[len(names) :])
        state = MemoryState(rest[: spec.depth], rest[spec.depth :])
        y, after = operator(spec, Case(**changed, weights=case.weights, state=state), 2)  # type: ignore[arg-type]
        return (y, *after.weights, *after.momentum)

    inputs: list[Any] = [getattr(case, name) for name in names] + [*case.state.weights, *case.state.momentum]
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("retention", ["lq", "lq_paper", "elastic_net", "kl"])
def test_a_memory_that_begins_at_zero_is_finite_and_has_finite_gradients(retention: str, backend: str) -> None:
    spec = MemorySpec(expansion=2, retention=retention, bias="lp", momentum=False)
    case = random_case(spec, 1, 7, 2, 3, seed=9)
    with torch.no_grad():
        for w in case.weights:
            w.zero_()
    result = operator(spec, case, 3, backend=backend)
    assert all(x.isfinite().all() for x in (result[0], *result[1].weights))
    assert all(g is None or g.isfinite().all() for g in gradients(case, result))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", BIASES)
def test_an_error_of_exactly_zero_writes_nothing_and_has_finite_gradients(bias: str, backend: str) -> None:
    spec = MemorySpec(depth=1, residual=False, bias=bias, retention="none", momentum=False)
    case = random_case(spec, 1, 5, 1, 3, seed=10)
    with torch.no_grad():
        case.weights[0].zero_()
        case.v.zero_()
        case.delta.zero_()
    result = operator(spec, case, 2, backend=backend)
    assert result[1].weights[0].count_nonzero() == 0
    assert all(g is None or g.isfinite().all() for g in gradients(case, result))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(KINDS))
def test_lower_precision_is_near_float64_with_a_float32_state(kind: str, dtype: torch.dtype) -> None:
    spec = KINDS[kind]
    case = random_case(spec, 1, 7, 2, 3, seed=11)
    low = Case(*(x.detach().to(dtype) for x in case.tensors()[:7]), [w.detach().float() for w in case.weights],
               case.gain.detach().float(), case.bias.detach().float())  # fmt: skip
    high = Case(*(x.double() for x in low.tensors()[:7]), [w.double() for w in low.weights], low.gain.double(),
                low.bias.double())  # fmt: skip
    (y, state), (wanted, exact) = operator(spec, low, 4), operator(spec, high, 4)
    assert y.dtype == dtype
    assert all(x.dtype == torch.float32 for x in state.weights + state.momentum)
    torch.testing.assert_close(y.double(), wanted, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.05)
    for a, b in zip(state.weights, exact.weights, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
