"""Known linear recurrences and TTT are memories with particular choices: equal to their textbook loops to 1e-10.

Each loop is written from its own paper in the row convention, o = q W, for one head of one sequence, and knows nothing
of memories, losses or chunks. The gates translate: alpha is the share forgotten, theta is beta/2 for the delta rules
and for TTT's learning rate on half the squared error, and 1/2 for the dot product losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from titans_dist.memory import MemorySpec, neural_memory

B, T, H, D = 2, 11, 2, 4
CHUNKS = [1, 3, 4, 16]
Loop = Callable[[int, int], tuple[Tensor, Tensor]]  # sequence, head -> o (T, D), the last matrix


def uniform(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q, V = normal(B, T, H, D, seed=1), normal(B, T, H, D, seed=2)
K = F.normalize(normal(B, T, H, D, seed=3), dim=-1)
W0 = normal(H, D, D, seed=4)
BETA = 0.9 * uniform(B, T, H, seed=5)  # the delta rules' and TTT's step
KEEP = 1 - 0.4 * uniform(B, T, H, seed=6)  # the share kept, data-dependent
HALF = torch.full((B, T, H), 0.5, dtype=torch.float64)


def assert_is(spec: MemorySpec, loop: Loop, chunk_size: int, backend: str = "torch", **arguments: object) -> None:
    """The operator's outputs and last state are those of the loop."""
    options: dict[str, object] = {"weights": [W0], **arguments}
    keys = options.pop("keys", K)
    y, state = neural_memory(Q, keys, V, spec=spec, chunk_size=chunk_size, backend=backend, **options)  # type: ignore[arg-type]
    for b in range(B):
        for h in range(H):
            o, w = loop(b, h)
            torch.testing.assert_close(y[:, :, h][b], o, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(state.weights[-1][b, h], w, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_linear_attention_is_a_matrix_under_the_dot_product_loss(chunk_size: int) -> None:
    """Katharopoulos et al. 2020, without the normalizer."""

    def loop(b: int, h: int) -> tuple[Tensor, Tensor]:
        w, o = W0[h], []
        for t in range(T):
            w = w + torch.outer(K[b, t, h], V[b, t, h])
            o.append(Q[b, t, h] @ w)
        return torch.stack(o), w

    assert_is(MemorySpec.preset("linear_attention"), loop, chunk_size, theta=HALF)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_retnet_forgets_at_one_constant_rate_per_head(chunk_size: int) -> None:
    """Sun et al. 2023, without the rotations."""
    gamma = torch.tensor([1 - 2.0**-5, 1 - 2.0**-3], dtype=torch.float64)

    def loop(b: int, h: int) -> tuple[Tensor, Tensor]:
        w, o = W0[h], []
        for t in range(T):
            w = gamma[h] * w + torch.outer(K[b, t, h], V[b, t, h])
            o.append(Q[b, t, h] @ w)
        return torch.stack(o), w

    assert_is(MemorySpec.preset("retnet"), loop, chunk_size, theta=HALF, alpha=(1 - gamma).expand(B, T, H))


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_mamba2_forgets_at_a_rate_that_the_token_decides(chunk_size: int) -> None:
    """Dao and Gu 2024, the state space duality's scalar recurrence: state = a_t state + (dt_t x_t) B_t."""
    dt = uniform(B, T, H, seed=7)

    def loop(b: int, h: int) -> tuple[Tensor, Tensor]:
        w, o = W0[h], []
        for t in range(T):
            w = KEEP[b, t, h] * w + dt[b, t, h] * torch.outer(K[b, t, h], V[b, t, h])
            o.append(Q[b, t, h] @ w)
        return torch.stack(o), w

    assert_is(MemorySpec.preset("mamba2"), loop, chunk_size, theta=dt / 2, alpha=1 - KEEP)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_deltanet_is_a_step_on_the_squared_error_at_the_tokens_own_memory(chunk_size: int) -> None:
    """Schlag et al. 2021; Yang et al. 2024: W (I - beta k^T k) + beta k^T v."""

    def loop(b: int, h: int) -> tuple[Tensor, Tensor]:
        w, o = W0[h], []
        for t in range(T):
            k, v, beta = K[b, t, h], V[b, t, h], BETA[b, t, h]
            w = (torch.eye(D, dtype=w.dtype) - beta * torch.outer(k, k)) @ w + beta * torch.outer(k, v)
            o.append(Q[b, t, h] @ w)
        return torch.stack(o), w

    assert_is(MemorySpec.preset("deltanet"), loop, chunk_size, theta=BETA / 2)


def gated_delta_rule(b: int, h: int) -> tuple[Tensor, Tensor]:
    """Yang et al. 2412.06464, eq 10: W_t = a_t (I - beta_t k^T k) W_{t-1} + beta_t k^T v."""
    w, o = W0[h], []
    for t in range(T):
        k, v, beta = K[b, t, h], V[b, t, h], BETA[b, t, h]
        w = KEEP[b, t, h] * (torch.eye(D, dtype=w.dtype) - beta * torch.outer(k, k)) @ w + beta * torch.outer(k, v)
        o.append(Q[b, t, h] @ w)
    return torch.stack(o), w


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_gated_deltanet_takes_the_gradient_at_the_decayed_memory(chunk_size: int) -> None:
    assert_is(MemorySpec.preset("gated_deltanet"), gated_delta_rule, chunk_size, theta=BETA / 2, alpha=1 - KEEP)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_gated_deltanet_is_titans_without_momentum_at_the_tokens_own_memory(chunk_size: int) -> None:
    spec = MemorySpec.preset("titans", depth=1, residual=False, momentum=False, anchor="token", decay="before")
    assert_is(spec, gated_delta_rule, chunk_size, theta=BETA / 2, alpha=1 - KEEP)


def test_titans_own_order_of_gradient_and_forgetting_is_not_gated_deltanet() -> None:
    """The two differ wherever something is forgotten; a test that could not tell them apart would prove little."""
    spec = MemorySpec.preset("gated_deltanet", decay="after")
    with pytest.raises(AssertionError):
        assert_is(spec, gated_delta_rule, 1, theta=BETA / 2, alpha=1 - KEEP)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_longhorn_is_deltanet_with_the_implicit_step(chunk_size: int) -> None:
    """Liu et al. 2407.14207: the step is beta / (1 + beta ||k||^2), for keys of any length."""
    keys = normal(B, T, H, D, seed=8)

    def loop(b: int, h: int) -> tuple[Tensor, Tensor]:
        w, o = W0[h], []
        for t in range(T):
            k, v, beta = keys[b, t, h], V[b, t, h], 3 * BETA[b, t, h]
            step = beta / (1 + beta * k.dot(k))
            w = w - step * torch.outer(k, k @ w - v)
            o.append(Q[b, t, h] @ w)
        return torch.stack(o), w

    assert_is(MemorySpec.preset("longhorn"), loop, chunk_size, theta=1.5 * BETA, keys=keys)


def test_longhorn_solves_its_own_proximal_problem() -> None:
    """The implicit step's definition: W_t minimizes ||W - W_{t-1}||^2 + beta ||k W - v||^2."""
    beta = torch.full((B, T, H), 0.7, dtype=torch.float64)
    _, state = neural_memory(Q[:, :1], K[:, :1], V[:, :1], spec=MemorySpec.preset("longhorn"), weights=[W0],
                             theta=beta[:, :1] / 2, chunk_size=1)  # fmt: skip
    w = state.weights[0]
    error = torch.einsum("bhd,bhde->bhe", K[:, 0], w) - V[:, 0]
    slope = (w - W0) + 0.7 * torch.einsum("bhd,bhe->bhde", K[:, 0], error)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-12)


GAIN, BIAS = 0.5 + uniform(H, D, seed=9), 0.1 * normal(H, D, seed=10)
W1, W2 = normal(H, D, 4 * D, seed=11) * D**-0.5, normal(H, 4 * D, D, seed=12) * (4 * D) ** -0.5
RATE = 0.2 * uniform(B, T, H, seed=13)


def normalized(z: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    mean, variance = z.mean(), z.var(correction=0)
    return (z - mean) / torch.sqrt(variance + 1e-6) * gain + bias


def through_norm(z: Tensor, target: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """d/dz of half the squared error between LN(z) and `target`, by LayerNorm's Jacobian written as a matrix."""
    std = torch.sqrt(z.var(correction=0) + 1e-6)
    unit = (z - z.mean()) / std
    jacobian = (torch.eye(D, dtype=z.dtype) - 1 / D - torch.outer(unit, unit) / D) / std
    return jacobian @ (gain * (unit * gain + bias - target))


def ttt_linear(chunk_size: int) -> Loop:
    """Sun et al. 2407.04620, section 2.7: f(x) = x + LN(x W), mini-batches of `chunk_size`, target v."""

    def loop(b: int, h: int) -> tuple[Tensor, Tensor]:
        w = W0[h]
        at_start, o = w, []
        for t in range(T):
            if t % chunk_size == 0:
                at_start = w
            k, q = K[b, t, h], Q[b, t, h]
            slope = through_norm(k @ at_start, V[b, t, h] - k, GAIN[h], BIAS[h])
            w = w - RATE[b, t, h] * torch.outer(k, slope)
            o.append(q + normalized(q @ w, GAIN[h], BIAS[h]))
        return torch.stack(o), w

    return loop


def ttt_mlp(chunk_size: int) -> Loop:
    """The same with f(x) = x + LN(gelu(x W1) W2) and no biases."""

    def gelu(z: Tensor) -> Tensor:
        return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))

    def gelu_slope(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    def loop(b: int, h: int) -> tuple[Tensor, Tensor]:
        w1, w2 = W1[h], W2[h]
        start1, start2, o = w1, w2, []
        for t in range(T):
            if t % chunk_size == 0:
                start1, start2 = w1, w2
            k, q, rate = K[b, t, h], Q[b, t, h], RATE[b, t, h]
            z = k @ start1
            slope = through_norm(gelu(z) @ start2, V[b, t, h] - k, GAIN[h], BIAS[h])
            w1 = w1 - rate * torch.outer(k, (start2 @ slope) * gelu_slope(z))
            w2 = w2 - rate * torch.outer(gelu(z), slope)
            o.append(q + normalized(gelu(q @ w1) @ w2, GAIN[h], BIAS[h]))
        return torch.stack(o), w2

    return loop


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_ttt_linear_is_a_matrix_with_residual_and_norm(chunk_size: int) -> None:
    spec = MemorySpec.preset("ttt_linear")
    assert_is(spec, ttt_linear(chunk_size), chunk_size, theta=RATE / 2, norm=(GAIN, BIAS))


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_ttt_mlp_is_two_layers_with_residual_and_norm(chunk_size: int) -> None:
    spec = MemorySpec.preset("ttt_mlp")
    assert_is(spec, ttt_mlp(chunk_size), chunk_size, theta=RATE / 2, norm=(GAIN, BIAS), weights=[W1, W2])


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_titans_without_momentum_and_forgetting_is_ttt(chunk_size: int) -> None:
    off = torch.zeros(B, T, H, dtype=torch.float64)
    gates = dict(theta=RATE / 2, alpha=off, eta=off, norm=(GAIN, BIAS))
    assert_is(MemorySpec.preset("titans"), ttt_mlp(chunk_size), chunk_size, weights=[W1, W2], **gates)
    assert_is(MemorySpec.preset("titans", depth=1), ttt_linear(chunk_size), chunk_size, **gates)


@pytest.mark.parametrize(
    ("name", "gates"),
    [
        ("linear_attention", {"theta": HALF}),
        ("mamba2", {"theta": HALF, "alpha": 1 - KEEP}),
        ("deltanet", {"theta": BETA / 2}),
        ("gated_deltanet", {"theta": BETA / 2, "alpha": 1 - KEEP}),
        ("longhorn", {"theta": BETA / 2}),
    ],
)
def test_gates_that_a_memory_has_not_are_ignored(name: str, gates: dict[str, Tensor]) -> None:
    """Callers may hand all memories the same: eta acts on nothing without momentum, nor alpha on retention none."""
    spec = MemorySpec.preset(name)
    wanted, _ = neural_memory(Q, K, V, spec=spec, weights=[W0], chunk_size=4, **gates)
    every = {"alpha": 1 - KEEP, "eta": BETA, **gates, "norm": (GAIN, BIAS)}
    found, _ = neural_memory(Q, K, V, spec=spec, weights=[W0], chunk_size=4, **every)  # type: ignore[arg-type]
    assert torch.equal(found, wanted)
