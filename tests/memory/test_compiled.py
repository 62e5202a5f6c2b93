"""backend="compiled" gives what the definition gives, with every gradient; what it does not cover goes without it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.memory.cases import EXACT, Case, operator, random_case
from titans_dist.config import ModelConfig
from titans_dist.memory import MemorySpec
from titans_dist.model import build_model

SPECS = {
    "titans": (MemorySpec(expansion=2), "after"),
    "plain matrix": (MemorySpec(depth=1, residual=False, momentum=False, activation="silu"), "before"),
}


def gradients(spec: MemorySpec, case: Case, **options: object) -> list[Tensor]:
    """Outputs of two calls, one of five chunks and a half and one from there on, the last state, and all gradients."""
    y, state = operator(spec, case.part(0, 22), 4, **options)
    z, state = operator(spec, case.part(22, None), 4, state=state, **options)
    ends = [*state.weights, *state.momentum]
    loss = sum((x * torch.linspace(1, 2, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in (y, z, *ends))
    grads = torch.autograd.grad(loss, case.tensors(), allow_unused=True)  # type: ignore[arg-type]
    return [y, z, *ends, *(g for g in grads if g is not None)]


@pytest.mark.parametrize("name", SPECS)
def test_it_is_the_definition(name: str) -> None:
    spec, read = SPECS[name]
    case = random_case(spec, 2, 29, 2, 4, seed=40)
    found = gradients(spec, case, read=read, backend="compiled")
    expected = gradients(spec, case, read=read, backend="recurrent")
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)


def test_what_it_does_not_cover_is_done_without_it() -> None:
    for kind in (MemorySpec.preset("moneta", expansion=2), MemorySpec.preset("gated_deltanet")):
        case = random_case(kind, 1, 9, 2, 4, seed=41)
        compiled, eager = (operator(kind, case, 4, backend=backend)[0] for backend in ("compiled", "torch"))
        torch.testing.assert_close(compiled, eager, rtol=EXACT, atol=EXACT)


def test_a_model_of_it_is_the_same_model() -> None:
    tokens = torch.randint(32, (2, 24), generator=torch.Generator().manual_seed(0))

    def results(backend: str) -> list[Tensor]:
        memory = {"expansion": 2, "chunk_size": 8, "backend": backend}
        config = ModelConfig(variant="lmm", num_layers=2, hidden_size=16, num_heads=2, vocab_size=32, memory=memory)  # type: ignore[arg-type]
        model = build_model(config).double()
        logits = model(tokens)
        logits.square().sum().backward()
        return [logits, *(value.grad for value in model.parameters() if value.grad is not None)]

    for a, b in zip(results("compiled"), results("torch"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
