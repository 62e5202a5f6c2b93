"""A memory whose hidden units are shared out: with one holder, it is the memory. Several are in tests/parallel."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from titans_dist.memory import MemorySpec, initial_state, neural_memory
from titans_dist.memory.hidden import shared_out

B, H, D = 2, 1, 4
SPECS = {
    "titans": MemorySpec.preset("titans", expansion=2),
    "ttt_mlp": MemorySpec.preset("ttt_mlp", expansion=2),
    "yaad": MemorySpec.preset("yaad", expansion=3),
    "plain": MemorySpec(expansion=2, residual=False, activation="silu", bias="dot"),
}


def inputs(spec: MemorySpec, length: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(length)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    gates = {name: drawn(B, length, H) for name in ("alpha", "eta", "theta", "delta")}
    weights = [drawn(H, *shape) for shape in spec.shapes(D)]
    return {"q": drawn(B, length, H, D), "k": drawn(B, length, H, D), "v": drawn(B, length, H, D), **gates} | {
        "weights": weights,
        "norm": (drawn(H, D), drawn(D)),
    }


def result(spec: MemorySpec, length: int, is_shared: bool, chunk_size: int, read: str) -> list[Tensor]:
    """y, the state after, and all gradients."""
    x = inputs(spec, length)
    options: dict[str, Any] = {
        "spec": spec,
        "alpha": 0.1 * x["alpha"].sigmoid(),
        "eta": x["eta"].sigmoid() if spec.momentum else None,
        "theta": 0.1 * x["theta"].sigmoid(),
        "delta": x["delta"].exp() if spec.bias == "huber" else None,
        "norm": x["norm"] if spec.residual else None,
        "state": initial_state(spec, x["weights"], B),
        "chunk_size": chunk_size,
        "read": read,
        "recompute": True,
    }
    if is_shared:
        whole = {"enter": Tensor.clone, "total": Tensor.clone}
        y, state = shared_out(x["q"], x["k"], x["v"], **options, **whole)
    else:
        y, state = neural_memory(x["q"], x["k"], x["v"], weights=x["weights"], **options)
    ends = [*state.weights, *state.momentum]
    (y.sin().sum() + sum(end.cos().sum() for end in ends)).backward()
    leaves = [leaf for value in x.values() for leaf in (value if isinstance(value, list | tuple) else [value])]
    return [y, *ends, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("name", SPECS)
@given(length=st.integers(1, 20), chunk_size=st.integers(1, 8), read=st.sampled_from(["after", "before", "start"]))
@settings(max_examples=15, deadline=None)
def test_one_holder_has_the_memory_of_the_operator(name: str, length: int, chunk_size: int, read: str) -> None:
    wanted = result(SPECS[name], length, False, chunk_size, read)
    found = result(SPECS[name], length, True, chunk_size, read)
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_the_specs_are_those_that_a_layout_allows() -> None:
    for spec in SPECS.values():
        assert dataclasses.asdict(spec)["depth"] == 2 and spec.is_linear and not spec.channel_wise
