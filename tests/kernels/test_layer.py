"""The kernels around the memory equal their formulas in float64, and so do their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from titans_kernels.norm_gate import norm_gate
from titans_kernels.short_conv import CHUNK, short_conv

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = [torch.float32, torch.bfloat16]


def convolved(
    x: Tensor, past: Tensor, weight: Tensor, head_dim: int, unit: bool, starts: Tensor | None, begin: Tensor | None
) -> Tensor:
    """One token at a time: the weighted sum of it and those before it in its document, SiLU, heads at length 1."""
    kernel, sequences = weight.shape[1], []
    for row in range(len(x)):
        seen, outputs = list(past[row % len(past)]), []
        for t, token in enumerate(x[row]):
            if starts is not None and starts[row, t]:
                assert begin is not None
                seen = list(begin[0])
            seen.append(token)
            outputs.append(sum(weight[:, i] * seen[len(seen) - kernel + i] for i in range(kernel)))
        sequences.append(torch.stack(outputs))
    y = F.silu(torch.stack(sequences)).unflatten(-1, (-1, head_dim))
    return y / y.norm(dim=-1, keepdim=True).clamp_min(1e-12) if unit else y


def normed_and_gated(y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    return y * (y.square().mean(-1, keepdim=True) + eps).rsqrt() * weight * gate * torch.sigmoid(gate)


def assert_equal_formula(
    kernel: Callable[..., Tensor], formula: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> None:
    """Output and all gradients, but for float32's rounding and that of the dtype they are stored in."""
    ours = [x.detach().requires_grad_() for x in inputs]
    theirs = [x.detach().double().requires_grad_() for x in inputs]
    y, expected = kernel(*ours), formula(*theirs)
    assert (y.dtype, y.shape) == (inputs[0].dtype, expected.shape)
    gradients = torch.autograd.grad(y, ours, grad)
    # Inputs that nothing depends on, as the past before documents, have a gradient of 0.
    unused_are_zeros = torch.autograd.grad(expected, theirs, grad.double(), materialize_grads=True, allow_unused=True)
    for found, wanted in zip([y, *gradients], [expected, *unused_are_zeros], strict=True):
        # GPUs round to nearest, Triton's interpreter toward zero: one unit in the last place at most.
        rtol = torch.finfo(torch.bfloat16).eps if found.dtype == torch.bfloat16 else 1e-5
        atol = 1e-5 * wanted.abs().max().item() if wanted.numel() else 0.0
        torch.testing.assert_close(found.double(), wanted, rtol=rtol, atol=atol + 1e-7)


def assert_equal_convolved(
    device: torch.device,
    batch: int = 1,
    length: int = 7,
    heads: int = 2,
    head_dim: int = 8,
    kernel: int = 4,
    past_rows: int = 1,
    unit: bool = True,
    starts: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> None:
    """starts: at which tokens of the sequences, laid end to end, documents begin."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device, dtype)

    channels = heads * head_dim
    inputs = [randn(batch, length, channels), randn(past_rows, kernel - 1, channels), randn(channels, kernel)]
    first = None
    if starts is not None:
        inputs.append(randn(1, kernel - 1, channels))
        first = torch.zeros(batch, length, dtype=torch.bool, device=device)
        first.view(-1)[list(starts)] = True

    def run(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, past: Tensor, weight: Tensor, begin: Tensor | None = None) -> Tensor:
            return f(x, past, weight, head_dim, unit, first, begin)

        return call

    assert_equal_formula(run(short_conv), run(convolved), inputs, randn(batch, length, heads, head_dim))


@few
@given(data=st.data())
def test_short_conv(data: st.DataObject, device: torch.device) -> None:
    batch, length = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 6))
    assert_equal_convolved(
        device,
        batch=batch,
        length=length,
        heads=data.draw(st.integers(1, 3)),
        head_dim=data.draw(st.sampled_from([8, 16, 24])),
        kernel=data.draw(st.integers(1, 5)),
        past_rows=data.draw(st.sampled_from([1, batch])),
        unit=data.draw(st.booleans()),
        starts=data.draw(st.none() | st.sets(st.integers(0, batch * length - 1)).map(sorted)),
        dtype=data.draw(st.sampled_from(DTYPES)),
        seed=data.draw(st.integers(0, 1000)),
    )


@pytest.mark.parametrize("starts", [None, [0, 2, CHUNK - 4, CHUNK - 1, CHUNK + 1, 2 * CHUNK]])
def test_short_conv_over_the_borders_of_chunks(starts: list[int] | None, device: torch.device) -> None:
    assert_equal_convolved(device, length=2 * CHUNK + 1, heads=1, starts=starts)


@pytest.mark.parametrize("at", [CHUNK - 2, CHUNK])
def test_a_document_begins_at_the_border_of_a_chunk(at: int, device: torch.device) -> None:
    assert_equal_convolved(device, length=CHUNK + 2, heads=1, starts=[at])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_short_conv_of_more_heads_than_a_program_has(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    assert_equal_convolved(device, batch=2, length=4, heads=18, head_dim=head_dim, past_rows=2, starts=[1], dtype=dtype)


def test_a_head_of_zeros_stays_one(device: torch.device) -> None:
    x, past, weight = torch.zeros(1, 3, 16), torch.zeros(1, 3, 16), torch.ones(16, 4)
    x[..., 8:] = 1.0
    inputs = [x.to(device), past.to(device), weight.to(device)]
    grad = torch.full((1, 3, 2, 8), 1e-12, device=device)  # against 1 / 1e-12
    assert_equal_formula(
        lambda *a: short_conv(*a, head_dim=8, unit=True), lambda *a: convolved(*a, 8, True, None, None), inputs, grad
    )


def test_short_conv_of_strided_tensors(device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 2, 48, generator=g).to(device).transpose(0, 1)[..., ::2]
    past, weight = torch.randn(3, 2, 24, generator=g).to(device).mT.mT.transpose(0, 1), torch.randn(4, 24).to(device).T
    starts, begin = torch.tensor([[False, True]] * 5, device=device).T, torch.randn(24, 3).to(device).T[None]
    grad = torch.randn(8, generator=g).to(device).expand(2, 5, 3, 8)
    assert not any(t.is_contiguous() for t in (x, past, weight, starts, begin, grad))
    assert_equal_formula(
        lambda x, past, weight, begin: short_conv(x, past, weight, 8, True, starts, begin),
        lambda x, past, weight, begin: convolved(x, past, weight, 8, True, starts, begin),
        [x, past, weight, begin],
        grad,
    )


def test_documents_need_what_lies_before_them() -> None:
    x, past = torch.zeros(1, 2, 8), torch.zeros(1, 3, 8)
    with pytest.raises(ValueError, match="starts and begin come together"):
        short_conv(x, past, torch.zeros(8, 4), 8, True, starts=torch.ones(1, 2, dtype=torch.bool))


def assert_equal_normed_and_gated(
    device: torch.device,
    batch: int,
    length: int,
    heads: int,
    head_dim: int,
    eps: float = 1e-5,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> None:
    g = torch.Generator().manual_seed(0)
    y, gate, grad = (torch.randn(batch, length, heads, head_dim, generator=g).to(device, dtype) for _ in range(3))
    weight = torch.randn(heads, head_dim, generator=g).to(device, dtype)
    assert_equal_formula(
        lambda *a: norm_gate(*a, eps), lambda *a: normed_and_gated(*a, eps), [scale * y, gate, weight], grad
    )


@few
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 9),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([8, 16, 24]),
    eps=st.sampled_from([1e-6, 1e-2]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.01, 1.0, 100.0]),
)
def test_norm_gate(
    batch: int,
    length: int,
    heads: int,
    head_dim: int,
    eps: float,
    dtype: torch.dtype,
    scale: float,
    device: torch.device,
) -> None:
    assert_equal_normed_and_gated(device, batch, length, heads, head_dim, eps, dtype, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_norm_gate_of_more_tokens_than_a_program_has(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    assert_equal_normed_and_gated(device, 3, 50, 2, head_dim, dtype=dtype)


def test_norm_gate_of_strided_tensors(device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    y = torch.randn(2, 3, 5, 8, generator=g).to(device).transpose(1, 2)
    gate, weight = torch.randn(2, 5, 3, 16, generator=g).to(device)[..., ::2], torch.randn(8, 3).to(device).T
    grad = torch.ones(1, device=device).expand(2, 5, 3, 8)
    assert not any(t.is_contiguous() for t in (y, gate, weight, grad))
    assert_equal_formula(lambda *a: norm_gate(*a, 1e-5), lambda *a: normed_and_gated(*a, 1e-5), [y, gate, weight], grad)
