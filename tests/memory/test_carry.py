"""What a call hands to the next, documents in one row, one token at a time, recomputation, and exact causality."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.memory import oracle
from tests.memory.cases import (
    KINDS,
    PRESETS,
    Result,
    assert_equal,
    assert_equal_gradients,
    gradients,
    in_parts,
    operator,
    random_case,
    random_state,
)
from titans_dist.memory import MemorySpec, memory_step

LENGTH = 11
STATEFUL = ["titans", "moneta", "yaad", "memora", "gated_deltanet", "lq", "lq_paper_momentum", "kl_momentum",
            "elastic_net", "channel_wise", "mamba2"]  # fmt: skip


def reads(kind: str) -> list[str]:
    """All reads; the state of a memory on the simplex does not hold what a running chunk began with."""
    return ["after", "before"] if KINDS[kind].retention == "kl" else ["after", "before", "start"]


def starts_at(*rows: list[int], length: int = LENGTH) -> Tensor:
    """(B, T), true at the given tokens of each row."""
    starts = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, tokens in enumerate(rows):
        starts[row, tokens] = True
    return starts


@pytest.mark.parametrize("kind", list(KINDS))
@settings(max_examples=8, deadline=None)
@given(cuts=st.sets(st.integers(1, LENGTH - 1), max_size=4), chunk_size=st.integers(1, 6))
def test_any_split_into_calls_equals_one_call(kind: str, cuts: set[int], chunk_size: int) -> None:
    case = random_case(KINDS[kind], 2, LENGTH, 2, 3, seed=1)
    with torch.no_grad():
        found = in_parts(KINDS[kind], case, sorted(cuts), chunk_size)
        assert_equal(found, operator(KINDS[kind], case, chunk_size))


@pytest.mark.parametrize("backend", ["torch", "recurrent"])
@pytest.mark.parametrize("read", ["after", "before"])
@pytest.mark.parametrize("kind", STATEFUL)
def test_split_into_single_tokens(kind: str, read: str, backend: str) -> None:
    case = random_case(KINDS[kind], 1, LENGTH, 2, 3, seed=2)
    with torch.no_grad():
        found = in_parts(KINDS[kind], case, list(range(1, LENGTH)), 4, read=read, backend=backend)
        assert_equal(found, operator(KINDS[kind], case, 4, read))


@pytest.mark.parametrize("retention", ["l2", "lq", "lq_paper", "elastic_net"])
def test_read_start_goes_on_inside_a_chunk(retention: str) -> None:
    spec = MemorySpec(expansion=2, retention=retention, threshold=0.01)
    case = random_case(spec, 1, LENGTH, 2, 3, seed=3)
    with torch.no_grad():
        for backend in ("torch", "recurrent"):
            assert_equal(in_parts(spec, case, [2, 3, 6], 4, read="start", backend=backend),
                         operator(spec, case, 4, "start"))  # fmt: skip


@settings(max_examples=8, deadline=None)
@given(cuts=st.sets(st.integers(1, LENGTH - 1), max_size=4), chunk_size=st.integers(1, 6), seed=st.integers(0, 99))
@pytest.mark.parametrize("kind", STATEFUL)
def test_any_split_with_documents_equals_one_call(kind: str, cuts: set[int], chunk_size: int, seed: int) -> None:
    case = random_case(KINDS[kind], 2, LENGTH, 2, 3, seed=4)
    g = torch.Generator().manual_seed(seed)
    case.starts = torch.rand(2, LENGTH, generator=g) < 0.2
    with torch.no_grad():
        found = in_parts(KINDS[kind], case, sorted(cuts), chunk_size)
        assert_equal(found, operator(KINDS[kind], case, chunk_size))


@pytest.mark.parametrize("kind", STATEFUL)
def test_gradients_go_through_a_carried_state(kind: str) -> None:
    """Also through the state inside a chunk: its anchor, and what forgetting has left of it."""
    case = random_case(KINDS[kind], 1, 7, 2, 3, seed=5)
    found = gradients(case, in_parts(KINDS[kind], case, [2, 4], 3))
    assert_equal_gradients(found, gradients(case, operator(KINDS[kind], case, 3)))


def test_a_long_sequence_is_worked_on_in_groups_that_show_nowhere() -> None:
    spec = MemorySpec(expansion=2, residual=False)
    case = random_case(spec, 1, 600, 1, 3, seed=6)
    case.starts = starts_at([540], length=600)
    with torch.no_grad():
        case.theta.mul_(0.2)  # a long chunk of large steps would amplify rounding
        whole = operator(spec, case, 32)
        assert_equal(in_parts(spec, case, [300, 333, 560], 32), whole)
        assert_equal(operator(spec, case, 32, backend="recurrent"), whole)


@pytest.mark.parametrize("read", ["after", "before"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_one_token_at_a_time_equals_the_operator(kind: str, read: str) -> None:
    """Decoding goes on from the state that a chunked call left, here inside a chunk."""
    spec = KINDS[kind]
    case = random_case(spec, 2, LENGTH, 2, 3, seed=7)
    with torch.no_grad():
        wanted = operator(spec, case, 4, read)
        y, state = operator(spec, case.part(0, 6), 4, read)
        outputs = [y]
        for t in range(6, LENGTH):
            y, state = memory_step(
                case.q[:, t],
                case.k[:, t],
                case.v[:, t],
                spec=spec,
                weights=case.weights,
                alpha=case.alpha[:, t],
                eta=case.eta[:, t],
                theta=case.theta[:, t],
                delta=case.delta[:, t],
                norm=(case.gain, case.bias),
                state=state,
                chunk_size=4,
                read=read,
            )
            assert y.shape == (2, 2, 3)
            outputs.append(y.unsqueeze(1))
    assert_equal((torch.cat(outputs, 1), state), wanted)


@pytest.mark.parametrize("backend", ["torch", "recurrent"])
@pytest.mark.parametrize(("kind", "read"), [(k, r) for k in KINDS for r in reads(k)])
def test_documents_of_one_row_equal_autograd_with_a_restarted_memory(kind: str, read: str, backend: str) -> None:
    """Documents that begin at the row's begin, inside a chunk (also two in one) and on a chunk's border."""
    spec = KINDS[kind]
    case = random_case(spec, 3, LENGTH, 1, 3, seed=8)
    case.starts = starts_at([0, 3, 8], [1, 2, 9], [])
    wanted = oracle.run(spec, case, 4, read)
    found = operator(spec, case, 4, read, backend=backend)
    if spec.anchor == "token":  # here the oracle's anchor is not that of any gradient
        found[1].anchor, wanted[1].anchor = [], []
    assert_equal(found, wanted)


@pytest.mark.parametrize("backend", ["torch", "recurrent"])
@pytest.mark.parametrize("read", ["after", "before"])
@pytest.mark.parametrize("kind", STATEFUL)
def test_gradients_with_documents_equal_autograd(kind: str, read: str, backend: str) -> None:
    spec = KINDS[kind]
    case = random_case(spec, 2, 7, 1, 3, seed=9)
    case.starts = starts_at([3, 4], [1], length=7)
    case.state, case.start = random_state(spec, 2, 1, 3, seed=10), random_state(spec, 2, 1, 3, seed=11)
    found = gradients(case, operator(spec, case, 3, read, backend=backend))
    assert_equal_gradients(found, gradients(case, oracle.run(spec, case, 3, read)))


@pytest.mark.parametrize("backend", ["torch", "recurrent"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_documents_of_one_row_do_not_see_each_other_bit_for_bit(kind: str, backend: str) -> None:
    case = random_case(KINDS[kind], 2, LENGTH, 2, 3, seed=12)
    documents = [range(0, 3), range(3, 8), range(8, LENGTH)]
    case.starts = starts_at([3, 8], [3, 8])
    with torch.no_grad():
        y, state = operator(KINDS[kind], case, 4, backend=backend)
        for number, document in enumerate(documents):
            rows = slice(document.start, document.stop)
            changed, after = operator(KINDS[kind], case.perturbed(slice(None), rows), 4, backend=backend)
            for other in documents:
                same = torch.equal(changed[:, other.start : other.stop], y[:, other.start : other.stop])
                assert same == (other != document)
            same = all(torch.equal(a, b) for a, b in zip(after.weights, state.weights, strict=True))
            assert same == (number < 2)  # the state is the last document's


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_document_on_a_chunk_border_equals_the_document_alone(kind: str) -> None:
    case = random_case(KINDS[kind], 2, LENGTH, 2, 3, seed=13)
    packed = replace(case, starts=starts_at([4], [4]))
    with torch.no_grad():
        y, state = operator(KINDS[kind], packed, 4)
        alone = operator(KINDS[kind], case.part(4, None), 4)
    assert_equal((y[:, 4:], state), alone, 1e-12)


@pytest.mark.parametrize("kind", ["titans", "moneta", "memora", "gated_deltanet"])
def test_a_document_begins_with_the_given_start(kind: str) -> None:
    spec = KINDS[kind]
    case = random_case(spec, 2, LENGTH, 2, 3, seed=14)
    start = random_state(spec, 2, 2, 3, seed=15)
    with torch.no_grad():
        y, state = operator(spec, replace(case, starts=starts_at([4], [4]), start=start), 4)
        first, second = (operator(spec, replace(case.part(*x), start=start), 4) for x in ((0, 4), (4, None)))
        assert_equal((y, state), (torch.cat([first[0], second[0]], 1), second[1]), 1e-12)
        given_as_state = operator(spec, replace(case, state=start), 4)
        assert_equal(operator(spec, replace(case, start=start), 4), given_as_state, 1e-12)


def test_a_start_at_the_first_token_drops_the_carried_state() -> None:
    spec = MemorySpec(expansion=2)
    case = random_case(spec, 1, LENGTH, 2, 3, seed=16)
    carried = replace(case, state=random_state(spec, 1, 2, 3, seed=17))
    fresh = operator(spec, case, 4)
    assert not torch.equal(operator(spec, carried, 4)[0], fresh[0])
    assert_equal(operator(spec, replace(carried, starts=starts_at([0])), 4), fresh, 1e-12)


def test_no_starts_and_starts_that_are_nowhere_are_the_same() -> None:
    spec = MemorySpec(expansion=2)
    case = random_case(spec, 1, LENGTH, 2, 3, seed=18)
    assert_equal(operator(spec, replace(case, starts=starts_at([])), 4), operator(spec, case, 4), 0)


@pytest.mark.parametrize("kind", STATEFUL)
def test_recomputing_changes_no_number_and_no_gradient(kind: str) -> None:
    """Long enough for several groups of chunks, with a document in one of them."""
    spec = KINDS[kind]
    case = random_case(spec, 1, 1100, 1, 3, seed=19)
    with torch.no_grad():
        for gate in (case.theta, case.eta):
            gate.mul_(0.2)  # so that a thousand tokens stay small
    case.starts = starts_at([600], length=1100)
    stored, again = (operator(spec, case, 100, recompute=recompute) for recompute in (False, True))
    assert_equal(again, stored, 0)
    assert_equal_gradients(gradients(case, again), gradients(case, stored), 1e-12)


@pytest.mark.parametrize("backend", ["torch", "recurrent"])
@pytest.mark.parametrize("read", ["after", "before"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_causality_is_exact(kind: str, read: str, backend: str) -> None:
    """Changing token j changes no output before it, bit for bit, and its write not even its own in read="before".

    On the simplex (kl) all of a chunk read what its first token left: a later token's write is seen in the next chunk.
    """
    spec = KINDS[kind]
    case = random_case(spec, 1, LENGTH, 2, 3, seed=20)
    with torch.no_grad():
        y, _ = operator(spec, case, 4, read, backend=backend)
        for j in (0, 3, 4, 6, 10):
            changed = case.perturbed(slice(None), j)
            other, _ = operator(spec, changed, 4, read, backend=backend)
            assert torch.equal(other[:, :j], y[:, :j])
            assert not torch.equal(other[:, j], y[:, j])
            changed.q = case.q
            other, _ = operator(spec, changed, 4, read, backend=backend)
            is_seen = read == "after" and (spec.retention != "kl" or j % 4 == 0)
            assert torch.equal(other[:, j], y[:, j]) == (not is_seen)


@pytest.mark.parametrize("kind", PRESETS)
def test_rows_of_a_batch_do_not_see_each_other(kind: str) -> None:
    case = random_case(KINDS[kind], 2, LENGTH, 2, 3, seed=21)
    with torch.no_grad():
        y, state = operator(KINDS[kind], case, 4)
        other, after = operator(KINDS[kind], case.perturbed(1, slice(None)), 4)
    assert torch.equal(other[0], y[0])
    assert all(torch.equal(a[0], b[0]) for a, b in zip(after.weights, state.weights, strict=True))
    assert not torch.equal(other[1], y[1])


def test_a_state_does_not_change_under_the_calls_that_use_it() -> None:
    spec = MemorySpec(expansion=2)
    case = random_case(spec, 1, LENGTH, 2, 3, seed=22)
    with torch.no_grad():
        _, state = operator(spec, case.part(0, 6), 4)
        copies = [x.clone() for x in (*state.weights, *state.momentum, *state.anchor)]
        for backend in ("torch", "recurrent"):
            operator(spec, case.part(6, None), 4, state=state, backend=backend)
        assert all(torch.equal(a, b) for a, b in
                   zip(copies, (*state.weights, *state.momentum, *state.anchor), strict=True))  # fmt: skip


def test_a_detached_state_cuts_the_gradient() -> None:
    spec = MemorySpec(expansion=2)
    case = random_case(spec, 1, LENGTH, 2, 3, seed=23)

    def second_half(cut: bool) -> Result:
        _, state = operator(spec, case.part(0, 6), 4)
        return operator(spec, case.part(6, None), 4, state=state.map(Tensor.detach) if cut else state)

    assert torch.equal(second_half(True)[0], second_half(False)[0])
    for cut in (True, False):
        (grad,) = torch.autograd.grad(second_half(cut)[0].sum(), case.k)
        assert grad[:, 6:].count_nonzero() and (grad[:, :6].count_nonzero() == 0) == cut


def test_clipping_the_states_gradient_changes_no_output_and_bounds_what_reaches_far_back() -> None:
    spec = MemorySpec(expansion=2, residual=False)
    case = random_case(spec, 1, 1100, 1, 3, seed=24)
    with torch.no_grad():
        for gate in (case.alpha, case.theta):
            gate.mul_(0.01)  # so that the last tokens still depend on the first

    def far_back(limit: float | None) -> tuple[Tensor, Tensor]:
        y, _ = operator(spec, case, 100, state_grad_clip=limit)
        (grad,) = torch.autograd.grad(y[:, -50:].sum(), case.v)
        return y, grad[:, :100]

    exact, loose, tight = (far_back(limit) for limit in (None, 1e9, 1e-20))
    assert torch.equal(loose[0], exact[0]) and torch.equal(tight[0], exact[0])
    torch.testing.assert_close(loose[1], exact[1], rtol=1e-12, atol=0)
    assert tight[1].norm() < 1e-18 < 1e-6 < exact[1].norm()


def test_a_clip_minds_what_is_asked_of_the_state_too() -> None:
    spec = MemorySpec(expansion=2)
    case = random_case(spec, 1, 1100, 1, 3, seed=25)
    with torch.no_grad():
        for gate in (case.alpha, case.theta):
            gate.mul_(0.01)

    def first_half(limit: float | None) -> Tensor:
        """Nothing is asked of the first call's outputs, so all of its gradient comes through the state."""
        y, state = operator(spec, case.part(0, 600), 100, state_grad_clip=limit)
        z, _ = operator(spec, case.part(600, None), 100, state=state, state_grad_clip=limit)
        (grad,) = torch.autograd.grad(z.sum() + 0 * y.sum(), case.v)
        return grad[:, :100]

    torch.testing.assert_close(first_half(1000.0), first_half(None), rtol=1e-12, atol=0)
    assert first_half(None).norm() > 1e-6
