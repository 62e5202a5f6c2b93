"""The memory's kernels give what the token-by-token oracle gives in float64, with every gradient."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.memory import oracle
from tests.memory.cases import Case, Result, gradients, in_parts, operator, random_case, random_state
from titans_dist.memory import MemorySpec, MemoryState, kernel_check, kernel_choice
from titans_dist.memory import chunked as torch_form
from titans_kernels import launch
from titans_kernels import memory as kernels

OUTPUTS, GRADIENTS = 2e-5, 1e-4
"""Largest relative error in float32."""

SPECS = {
    "titans": (MemorySpec(expansion=2), "after"),
    "read before": (MemorySpec(expansion=2), "before"),
    "read at the start": (MemorySpec(expansion=2), "start"),
    "matrix": (MemorySpec(depth=1), "after"),
    "matrix, huber, no momentum": (MemorySpec(depth=1, bias="huber", momentum=False), "before"),
    "huber": (MemorySpec(expansion=2, bias="huber"), "after"),
    "dot, silu": (MemorySpec(expansion=1, bias="dot", activation="silu"), "after"),
    "no residual": (MemorySpec(expansion=2, residual=False), "after"),
    "nothing forgotten": (MemorySpec(expansion=2, retention="none", momentum=False), "after"),
    "relu": (MemorySpec(expansion=2, activation="relu", momentum=False), "before"),
    "identity": (MemorySpec(expansion=1, activation="identity", residual=False), "after"),
    "linear attention": (MemorySpec.preset("linear_attention"), "after"),
}


def single(case: Case) -> Case:
    """The case in float32, on the same graph."""

    def change(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.float() if x.is_floating_point() else x
        if isinstance(x, list):
            return [change(each) for each in x]
        return x.map(change) if isinstance(x, MemoryState) else x

    return replace(case, **{field.name: change(getattr(case, field.name)) for field in fields(case)})


def by_kernels(spec: MemorySpec, case: Case, chunk_size: int, read: str = "after", **options: object) -> Result:
    return double(operator(spec, single(case), chunk_size, read, backend="triton", **options))


def double(result: Result) -> Result:
    return result[0].double(), result[1].map(torch.Tensor.double)


def assert_close(found: Result, wanted: Result, outputs: float = OUTPUTS) -> None:
    assert found[1].position == wanted[1].position
    pairs = [(found[0], wanted[0])]
    for name in ("weights", "momentum", "anchor"):
        pairs += zip(getattr(found[1], name), getattr(wanted[1], name), strict=True)
    for a, b in pairs:
        assert relative(a, b) <= outputs


def assert_close_gradients(found: list[Tensor | None], wanted: list[Tensor | None], limit: float = GRADIENTS) -> None:
    for a, b in zip(found, wanted, strict=True):
        if a is None or b is None:
            assert all(x is None or not x.count_nonzero() for x in (a, b))
        else:
            assert relative(a, b) <= limit


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm().clamp_min(1e-9)).detach())


@pytest.mark.parametrize("name", SPECS)
def test_the_kernels_are_the_recurrence(name: str) -> None:
    spec, read = SPECS[name]
    case = random_case(spec, 1, 40, 2, 16, seed=1)
    case.state = random_state(spec, 1, 2, 16, seed=2)
    found, wanted = by_kernels(spec, case, 16, read), oracle.run(spec, case, 16, read)
    assert_close(found, wanted)
    assert_close_gradients(gradients(case, found), gradients(case, wanted))


@settings(max_examples=8, deadline=None)
@given(
    chunks=st.integers(0, 2),
    rest=st.integers(0, 23),
    chunk_size=st.sampled_from((1, 2, 7, 12, 16, 24)),
    head_dim=st.sampled_from((8, 16, 24)),
    batch=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_any_length_chunk_and_head(
    chunks: int, rest: int, chunk_size: int, head_dim: int, batch: int, seed: int
) -> None:
    """As near to float64 as the torch form in float32 is, also where the recurrence magnifies what is rounded."""
    spec = MemorySpec(expansion=2)
    case = random_case(spec, batch, max(1, chunks * chunk_size + min(rest, chunk_size)), 1, head_dim, seed)
    found, wanted = by_kernels(spec, case, chunk_size), operator(spec, case, chunk_size, backend="recurrent")
    other = double(operator(spec, single(case), chunk_size, backend="torch"))
    assert_close(found, wanted, OUTPUTS + 5 * relative(other[0], wanted[0]))
    for a, b, c in zip(*(gradients(case, x) for x in (found, wanted, other)), strict=True):
        if a is not None and b is not None and c is not None:
            assert relative(a, b) <= GRADIENTS + 5 * relative(c, b)


@pytest.mark.parametrize("cuts", [[16], [5], [5, 7, 37], [33, 34]])
def test_a_sequence_in_parts_is_the_whole(cuts: list[int]) -> None:
    spec = MemorySpec(expansion=2)
    case = random_case(spec, 2, 40, 1, 16, seed=3)
    found = double(in_parts(spec, single(case), cuts, 16, backend="triton"))
    wanted = oracle.run(spec, case, 16)
    assert_close(found, wanted)
    assert_close_gradients(gradients(case, found), gradients(case, wanted))


@pytest.mark.parametrize("read", ["after", "before", "start"])
@pytest.mark.parametrize("depth", [1, 2])
def test_documents_begin_anew(depth: int, read: str) -> None:
    """Documents at a chunk's border, inside one, two in one, at the first token and inside the last, shorter chunk."""
    spec = MemorySpec(depth=depth, expansion=2)
    case = random_case(spec, 3, 44, 1, 16, seed=4)
    case.start = random_state(spec, 3, 1, 16, seed=5)
    case.starts = torch.zeros(3, 44, dtype=torch.bool)
    case.starts[0, [16, 21, 23]] = True
    case.starts[1, [0, 41]] = True
    found, wanted = by_kernels(spec, case, 16, read), oracle.run(spec, case, 16, read)
    assert_close(found, wanted)
    assert_close_gradients(gradients(case, found), gradients(case, wanted))


def test_gates_at_their_ends() -> None:
    """All forgotten at one token, momentum lost or kept whole: nothing is divided, so nothing becomes infinite."""
    spec = MemorySpec(expansion=2)
    case = random_case(spec, 1, 32, 1, 16, seed=6)
    with torch.no_grad():
        case.alpha[:, 3], case.alpha[:, 20:23], case.alpha[:, 25] = 1.0, 0.999999, 0.0
        case.eta[:, 5], case.eta[:, 18], case.theta[:, 9] = 0.0, 1.0, 0.0
    found, wanted = by_kernels(spec, case, 16), oracle.run(spec, case, 16)
    assert_close(found, wanted)
    assert_close_gradients(gradients(case, found), gradients(case, wanted))


def test_any_strides() -> None:
    spec = MemorySpec(expansion=1)
    case = random_case(spec, 2, 20, 2, 16, seed=7)
    wanted = by_kernels(spec, case, 16)

    def odd(x: Tensor) -> Tensor:
        """The same numbers, backward in memory and with gaps."""
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
        return wide.transpose(0, 1).contiguous().transpose(0, 1)[..., ::2].copy_(x.detach()).requires_grad_()

    strange = replace(case, **{name: odd(getattr(case, name)) for name in ("q", "k", "v", "alpha", "eta", "theta")})
    found = by_kernels(spec, strange, 16)
    assert_close(found, wanted, 0.0)
    assert_close_gradients(gradients(strange, found), gradients(case, wanted), 0.0)


def test_the_same_inputs_give_the_same_bits_however_much_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether chunks' states are kept or worked out again, and in how many segments a sequence goes by."""
    spec = MemorySpec(expansion=2)
    case = random_case(spec, 1, 40, 1, 16, seed=8)
    results = []
    for recompute in (False, True, True):
        found = by_kernels(spec, case, 16, recompute=recompute)
        results.append([found[0], *found[1].weights, *gradients(case, found)])
    monkeypatch.setattr(launch, "WORKSPACE_BYTES", 1)  # a segment of each chunk
    found = by_kernels(spec, case, 16)
    parts = [found[0], *found[1].weights, *gradients(case, found)]
    for a, b, c, d in zip(*results, parts, strict=True):
        if a is not None:
            assert torch.equal(a, b) and torch.equal(a, c)
            torch.testing.assert_close(d, a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("documents", [False, True])
def test_the_gradient_between_groups_is_limited(documents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_form, "GROUP_TOKENS", 32)
    spec = MemorySpec(expansion=2)
    case = random_case(spec, 2, 72, 1, 16, seed=9)
    if documents:
        case.start = random_state(spec, 2, 1, 16, seed=10)
        case.starts = torch.zeros(2, 72, dtype=torch.bool)
        case.starts[0, [32, 50]] = True

    def found(limit: float | None) -> list[Tensor | None]:
        return gradients(case, by_kernels(spec, case, 16, state_grad_clip=limit))

    wanted = operator(spec, case, 16, state_grad_clip=0.1, backend="torch")
    assert_close_gradients(found(0.1), gradients(case, wanted), 1e-3)
    assert any(relative(a, b) > 0.01 for a, b in zip(found(0.1), found(None), strict=True) if a is not None)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_infinite_gradients_become_finite_at_a_group_border(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_form, "GROUP_TOKENS", 16)
    spec = MemorySpec(expansion=2)
    case = random_case(spec, 1, 32, 1, 16, seed=11)
    y, _ = operator(spec, single(case), 16, state_grad_clip=1.0, backend="triton")
    weight = torch.ones_like(y)
    weight[:, 16:] = 1e38  # the sum of squares is beyond float32
    (g_k,) = torch.autograd.grad((y * weight).sum(), [case.k])
    assert g_k[:, :16].isfinite().all() and g_k[:, :16].count_nonzero()


BAD: dict[str, tuple[MemorySpec, Callable[[Case], Case], int, str]] = {
    "retention": (MemorySpec.preset("moneta", expansion=2), single, 16, "retention 'lq_paper' has no kernels"),
    "delta rule": (MemorySpec.preset("gated_deltanet"), single, 16, "every token's own memory"),
    "channels": (MemorySpec(expansion=2, channel_wise=True), single, 16, "channel-wise gates"),
    "loss": (MemorySpec(expansion=2, bias="lp"), single, 16, "loss 'lp': use l2, dot, huber"),
    "depth": (MemorySpec(depth=3, expansion=1), single, 16, "memories of 3 layers"),
    "chunk": (
        MemorySpec(expansion=1),
        single,
        256,
        "chunks of 256 tokens of heads of 16 in float32: use chunks of 64 or fewer",
    ),
    "dtype": (MemorySpec(expansion=1), lambda case: case, 16, "float64 has no kernels"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_has_no_kernel_is_named(name: str) -> None:
    spec, change, chunk_size, reason = BAD[name]
    case = change(random_case(spec, 1, 16, 1, 16, seed=12))
    with pytest.raises(ValueError, match=f"backend='triton' cannot be had: .*{reason}.*; use backend='auto'"):
        operator(spec, case, chunk_size, backend="triton")


def test_wide_heads_have_no_kernel() -> None:
    spec = MemorySpec(expansion=1)
    with pytest.raises(ValueError, match="heads of 160 dimensions: use 128 or fewer"):
        operator(spec, single(random_case(spec, 1, 4, 1, 160, seed=13)), 16, backend="triton")


def test_without_a_gpu_or_triton_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert kernel_choice.lacking("auto", cuda, torch.bfloat16) is None
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert kernel_choice.lacking("triton", cpu, torch.float32) == "the tensors are on cpu, not on an NVIDIA GPU"
    monkeypatch.setattr(kernel_choice.importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed" in str(kernel_choice.lacking("auto", cuda, torch.float32))


def test_auto_says_once_why_it_does_without(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kernel_choice._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert not kernel_choice.uses_kernels("auto", "channel-wise gates have no kernels")
    assert caplog.messages == ["the memory goes without Triton kernels: channel-wise gates have no kernels"]


def test_kernels_that_are_wrong_on_a_device_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a compiler or a driver might do: the check before the first use sees it, and says by how much."""
    spec, arguments = MemorySpec(expansion=2), (16, 16, "after", torch.float32, torch.device("cpu"))
    check = kernel_check.failed_check.__wrapped__
    assert check(spec, *arguments) is None
    right = launch.gates

    def wrong(*given: Any) -> launch.Gates:
        found = right(*given)
        return replace(found, add=found.add * 1.05)

    monkeypatch.setattr(kernels, "gates", wrong)
    assert "on this device they differ from the torch form" in check(spec, *arguments)


def test_the_check_before_the_first_use_is_not_seen_by_what_surrounds_it() -> None:
    """Checkpointing counts the tensors a block saves: those of the check, which runs once, must not be among them."""

    def refuse(x: Tensor) -> Tensor:
        raise AssertionError("the check saves its tensors in here")

    check, cpu = kernel_check.failed_check.__wrapped__, torch.device("cpu")
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(refuse, refuse):
        assert check(MemorySpec(depth=1), 16, 16, "after", torch.float32, cpu) is None


def test_checkpointing_drops_all_that_is_kept() -> None:
    """All that the backward pass needs is among the saved tensors, which checkpointing drops and works out again."""
    spec = MemorySpec(expansion=1)
    case = single(random_case(spec, 1, 32, 1, 16, seed=14))
    leaves = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
    nodes = []

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        given = replace(case, q=q, k=k, v=v)
        y = operator(spec, given, 16, backend="triton", recompute=False, state_grad_clip=None)[0]
        nodes.append(y.grad_fn)
        return y

    wanted = torch.autograd.grad(call(*leaves).square().sum(), leaves)
    found = torch.autograd.grad(checkpoint(call, *leaves, use_reentrant=False).square().sum(), leaves)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)
    for node in nodes:
        values = [x for value in vars(node).values() for x in (value if isinstance(value, list | tuple) else [value])]
        assert values and not any(isinstance(x, Tensor) for x in values)
