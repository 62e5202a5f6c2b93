"""What does not fit is refused in one sentence that names the argument, what came and what is allowed."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.memory.cases import PRESETS, random_case
from titans_dist.memory import MemorySpec, MemoryState, initial_state, memory_step, neural_memory

B, T, H, D = 2, 6, 2, 4


def arguments(spec: MemorySpec) -> dict[str, Any]:
    """A call that is right, with every gate."""
    case = random_case(spec, B, T, H, D, seed=1)
    return dict(
        q=case.q, k=case.k, v=case.v, spec=spec, weights=case.weights, alpha=case.alpha, eta=case.eta,
        theta=case.theta, delta=case.delta, norm=(case.gain, case.bias), chunk_size=4,
    )  # fmt: skip


def refused(words: list[str], **call: Any) -> None:
    """The call raises ValueError with one sentence that says all of `words`."""
    with pytest.raises(ValueError) as caught:
        neural_memory(**call)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert "\n" not in message and not re.search(r"\. [A-Z]", message), f"more than a sentence: {message}"


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.float64)


HUBER = MemorySpec(bias="huber")
FORGETTING = ("l2", "lq", "lq_paper", "kl", "elastic_net")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("q", zeros(T, H, D), ["q has shape (6, 2, 4)", "(B, T, H, D)"]),
        ("q", zeros(B, 0, H, D), ["q has shape (2, 0, 2, 4)", "T >= 1"]),
        ("k", zeros(B, 3, H, D), ["k has shape (2, 3, 2, 4)", "(2, 6, 2, 4)"]),
        ("k", zeros(B, T, H, D + 1), ["k has shape (2, 6, 2, 5)", "(2, 6, 2, 4)"]),
        ("v", zeros(B, T, D, H), ["v has shape (2, 6, 4, 2)", "(2, 6, 2, 4)"]),
        ("alpha", zeros(B, T), ["alpha has shape (2, 6)", "(2, 6, 2)"]),
        ("eta", zeros(1, T, H), ["eta has shape (1, 6, 2)", "(2, 6, 2)"]),
        ("theta", zeros(B, T, H, D), ["theta has shape (2, 6, 2, 4)", "(2, 6, 2)"]),
        ("delta", zeros(B, T, 1), ["delta has shape (2, 6, 1)", "(2, 6, 2)"]),
        ("weights", [zeros(H, D, D)], ["weights", "(2, 4, 4)", "(2, 4, 16)", "(2, 16, 4)"]),
        ("weights", [zeros(1, D, 16), zeros(H, 16, D)], ["weights", "(1, 4, 16)", "(2, 4, 16)"]),
        ("norm", (zeros(H, D), zeros(B, D, 3)), ["norm", "(2, 4, 3)", "(4,)", "(2, 4)"]),
        ("starts", torch.zeros(B, T + 1, dtype=torch.bool), ["starts", "(2, 7)", "(2, 6)"]),
        ("starts", torch.zeros(T, dtype=torch.bool), ["starts", "(6,)", "(2, 6)"]),
    ],
)
def test_wrong_shapes(name: str, value: Any, words: list[str]) -> None:
    refused(words, **{**arguments(HUBER), name: value})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("q", torch.zeros(B, T, H, D, dtype=torch.int64), ["q has dtype torch.int64", "float32", "bfloat16"]),
        ("q", torch.zeros(B, T, H, D, dtype=torch.float16), ["q has dtype torch.float16", "float32", "bfloat16"]),
        ("q", torch.zeros(B, T, H, D, dtype=torch.complex64), ["q has dtype torch.complex64", "float32"]),
        ("k", torch.zeros(B, T, H, D, dtype=torch.float32), ["k has dtype torch.float32", "torch.float64"]),
        ("v", torch.zeros(B, T, H, D, dtype=torch.bfloat16), ["v has dtype torch.bfloat16", "torch.float64"]),
        ("alpha", torch.zeros(B, T, H, dtype=torch.int32), ["alpha has dtype torch.int32"]),
        ("theta", torch.zeros(B, T, H, dtype=torch.bool), ["theta has dtype torch.bool"]),
        ("starts", torch.zeros(B, T, dtype=torch.int64), ["starts", "torch.int64", "bool"]),
    ],
)
def test_wrong_dtypes(name: str, value: torch.Tensor, words: list[str]) -> None:
    refused(words, **{**arguments(HUBER), name: value})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gates_weights_and_norm_of_another_float_dtype_than_q_are_fine(dtype: torch.dtype) -> None:
    """They are parameters or come out of their own map, often float32 beside bfloat16 queries."""
    call = arguments(HUBER)
    call.update({name: call[name].to(dtype) for name in ("q", "k", "v")})
    for other in (torch.float32, torch.float64):
        call.update({name: call[name].to(other) for name in ("alpha", "eta", "theta", "delta")})
        call["weights"], call["norm"] = ([x.to(other) for x in call[name]] for name in ("weights", "norm"))
        y, state = neural_memory(**call)
        assert y.dtype == dtype
        assert state.weights[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("name", ["state", "start"])
def test_a_state_of_another_precision_than_the_inputs(name: str) -> None:
    """Casting it would hide that half a sequence was worked on in another precision."""
    call = arguments(MemorySpec())
    state = initial_state(MemorySpec(), [w.float() for w in call["weights"]], B)
    refused([name, "torch.float32", "torch.float64"], **{**call, name: state})


@pytest.mark.parametrize(
    ("spec", "name", "why"),
    [
        *[(MemorySpec(retention=r), "alpha", f"retention='{r}'") for r in FORGETTING],
        (MemorySpec(), "eta", "momentum"),
        (HUBER, "delta", "bias='huber'"),
        (MemorySpec(), "norm", "residual=True"),
    ],
)  # fmt: skip
def test_what_a_memory_needs_is_missing(spec: MemorySpec, name: str, why: str) -> None:
    refused([f"{name} is missing", why], **{**arguments(spec), name: None})


def test_channel_wise_gates_are_asked_for_by_their_shape() -> None:
    spec = MemorySpec(channel_wise=True)
    refused(["alpha has shape (2, 6, 2)", "(2, 6, 2, 4)"], **{**arguments(spec), "alpha": zeros(B, T, H)})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("chunk_size", 0, ["chunk_size=0", "1"]),
        ("chunk_size", -4, ["chunk_size=-4", "1"]),
        ("read", "during", ["read='during'", "after", "before"]),
        ("backend", "fast", ["backend='fast'", "torch", "recurrent"]),
    ],
)
def test_unknown_choices_of_the_call(name: str, value: Any, words: list[str]) -> None:
    refused(words, **{**arguments(HUBER), name: value})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bias": "l7"}, ["bias='l7'", "l2", "dot", "l1", "lp", "huber"]),
        ({"retention": "all"}, ["retention='all'", "none", "l2", "lq", "lq_paper", "kl", "elastic_net"]),
        ({"activation": "tanh"}, ["activation='tanh'", "gelu", "silu", "relu", "identity"]),
        ({"anchor": "segment"}, ["anchor='segment'", "chunk", "token"]),
        ({"decay": "never", "anchor": "token"}, ["decay='never'", "after", "before"]),
        ({"depth": 0}, ["depth=0", "1"]),
        ({"expansion": 0}, ["expansion=0", "1"]),
        ({"p": 0.5}, ["p=0.5", "1"]),
        ({"q": 1.0}, ["q=1.0", "2"]),
        ({"sharpness": 0.0}, ["sharpness=0.0"]),
        ({"threshold": -1e-3}, ["threshold=-0.001", "0"]),
        ({"threshold": float("nan")}, ["threshold=nan"]),
        ({"channel_wise": True, "depth": 3}, ["channel_wise", "depth"]),
        ({"channel_wise": True, "retention": "lq"}, ["channel_wise", "retention", "l2"]),
        ({"channel_wise": True, "anchor": "token", "depth": 1}, ["channel_wise", "anchor='chunk'"]),
        ({"anchor": "token", "retention": "kl"}, ["anchor='token'", "retention", "'kl'"]),
        ({"decay": "before"}, ["decay='before'", "anchor='token'"]),
        ({"implicit": True}, ["implicit=True", "depth=1", "anchor='token'"]),
        ({"implicit": True, "depth": 1, "anchor": "token", "bias": "dot"}, ["implicit=True", "bias='l2'"]),
    ],
)
def test_choices_of_a_spec_that_do_not_exist_or_go_together(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        MemorySpec(**changes)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError) as caught:
        MemorySpec.preset("titan")
    assert "'titan'" in str(caught.value) and all(name in str(caught.value) for name in PRESETS)


@pytest.mark.parametrize(
    "changes",
    [
        {"depth": 2},
        {"depth": 1, "residual": True},
        {"depth": 1, "momentum": True, "residual": False},
        {"depth": 1, "residual": False, "momentum": False, "bias": "huber"},
    ],
)
@pytest.mark.parametrize("backend", ["torch", "recurrent"])
def test_gradients_at_every_token_have_a_chunked_form_for_matrices_only(changes: dict[str, Any], backend: str) -> None:
    spec = MemorySpec(anchor="token", **changes)
    refused(["chunk_size=4", "anchor='token'", "use chunk_size=1"], **{**arguments(spec), "backend": backend})
    neural_memory(**{**arguments(spec), "backend": backend, "chunk_size": 1})


@pytest.mark.parametrize("name", ["state", "start"])
def test_states_of_another_memory(name: str) -> None:
    spec = MemorySpec(momentum=True)
    call = arguments(spec)
    other_batch = initial_state(spec, call["weights"], 3)
    refused([name, "(3, 2, 4, 16)", "(2, 2, 4, 16)"], **{**call, name: other_batch})
    right = initial_state(spec, call["weights"], B)
    refused([name, "momentum"], **{**call, name: replace(right, momentum=[])})
    refused([name, "momentum"], **{**call, name: replace(right, momentum=[x[:1] for x in right.momentum])})
    shallow = MemorySpec(depth=1)
    state = initial_state(shallow, [zeros(H, D, D)], B)
    refused([name, "(2, 2, 4, 4)"], **{**call, name: state})


def test_a_state_from_another_chunk_size() -> None:
    call = arguments(MemorySpec())
    _, state = neural_memory(**call)  # six tokens: two in the running chunk of four
    refused(["chunk_size=2", "state"], **{**call, "state": state, "chunk_size": 2})
    refused(["start", "chunk"], **{**call, "start": state})


def test_a_state_inside_a_chunk_without_its_anchor() -> None:
    """A state that someone put together, for example from a file: the position says more than it holds."""
    call = arguments(MemorySpec())
    _, state = neural_memory(**call)
    refused(["state", "anchor"], **{**call, "state": MemoryState(state.weights, state.momentum, position=2)})


def test_one_token_has_no_time_dimension() -> None:
    call = arguments(MemorySpec())
    one = {name: x[:, 0] if isinstance(x, torch.Tensor) else x for name, x in call.items()}
    memory_step(**one)
    with pytest.raises(ValueError, match=r"\(B, H, D\)|\(B, T, H, D\)"):
        memory_step(**{**one, "q": call["q"]})
