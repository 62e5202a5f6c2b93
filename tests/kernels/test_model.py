"""Models whose memory, convolutions and output norms are kernels are the same models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from titans_dist.config import MemoryConfig, ModelConfig
from titans_dist.layers import kernels
from titans_dist.layers.neural_memory import NeuralMemory
from titans_dist.model import build_model

LENGTH, CHUNK = 40, 16


def results(variant: str, backend: str, starts: bool, **memory: object) -> list[Tensor]:
    """Logits of a small model, and the gradients of all parameters."""
    config = ModelConfig(
        variant=variant,
        num_layers=1,
        hidden_size=32,
        num_heads=2,
        vocab_size=32,
        window=16,
        segment_length=16,
        persistent_tokens=2,
        memory=MemoryConfig(**{"expansion": 2, "chunk_size": CHUNK, "backend": backend, **memory}),  # type: ignore[arg-type]
    )
    model = build_model(config)
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(32, (2, LENGTH), generator=g)
    documents = torch.zeros(2, LENGTH, dtype=torch.bool)
    documents[0, [0, 13, 33]] = True
    logits = model(tokens, starts=documents) if starts else model(tokens)
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("variant", ["lmm", "mag", "mal", "mac"])
def test_a_model_by_kernels_is_the_same_model(variant: str, starts: bool) -> None:
    found, wanted = (results(variant, backend, starts) for backend in ("triton", "torch"))
    assert len(found) == len(wanted) > 10
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).norm() / b.norm().clamp_min(1e-6)) < 1e-3


def test_tnt_by_kernels_is_the_same_model() -> None:
    tnt = {"global_chunk_size": 32, "shard_size": 32}
    for a, b in zip(results("lmm", "triton", False, **tnt), results("lmm", "torch", False, **tnt), strict=True):
        assert float((a - b).norm() / b.norm().clamp_min(1e-6)) < 1e-3


def test_the_layer_around_the_memory_goes_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from titans_kernels import norm_gate, short_conv

    calls: list[str] = []
    for module, name in ((short_conv, "short_conv"), (norm_gate, "norm_gate")):
        right = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, right=right, name=name: (calls.append(name), right(*given))[1])
    results("lmm", "triton", False)
    assert sorted(set(calls)) == ["norm_gate", "short_conv"]
    calls.clear()
    results("lmm", "auto", False)  # on a CPU
    assert not calls


def test_a_layer_says_what_it_cannot_do() -> None:
    config = ModelConfig(hidden_size=32, num_heads=2, memory=MemoryConfig(backend="triton"))
    layer = NeuralMemory(config).double()
    with pytest.raises(ValueError, match="float64 has no kernels"):
        layer(torch.zeros(1, 4, 32, dtype=torch.float64), None)


def test_a_layers_kernels_are_checked_before_their_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    from titans_kernels import norm_gate

    check, given = kernels.failed_check.__wrapped__, (16, 4, torch.float32, torch.device("cpu"))
    assert check(*given) is None
    right = norm_gate.norm_gate
    monkeypatch.setattr(norm_gate, "norm_gate", lambda *given: right(*given) * 1.01)
    assert "on this device they differ from the torch form, relative error 1.0e-02" in check(*given)

    def broken(*given: object) -> Tensor:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(norm_gate, "norm_gate", broken)
    assert check(*given) == "on this device they do not run: out of resource: shared memory"


def test_long_convolutions_have_no_kernel() -> None:
    with pytest.raises(ValueError, match="convolutions over 40 tokens have no kernels, up to 32 have"):
        kernels.by_kernels("triton", torch.zeros(1), 16, 40)
