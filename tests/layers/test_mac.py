"""MAC equals MATH.md's section on it, written with explicit loops: one head, one token at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.layers.definitions import Matrix, attended, convolved, rms, turned, unit
from titans_dist.config import MemoryConfig, ModelConfig
from titans_dist.layers.mac import MemoryAsContext
from titans_dist.layers.parameter import Parameter
from titans_dist.model import build_model

HEADS, DIM, CHUNK = 2, 6, 2
HIDDEN = HEADS * DIM


def mac(persistent: int, segment: int) -> MemoryAsContext:
    """A layer whose parameters are all random, so that no part of it hides behind a 0 or a 1."""
    config = ModelConfig(
        variant="mac",
        hidden_size=HIDDEN,
        num_heads=HEADS,
        segment_length=segment,
        persistent_tokens=persistent,
        conv_kernel=3,
        rope_theta=50.0,
        memory={"depth": 1, "residual": False, "momentum": False, "chunk_size": CHUNK, "theta_max": 0.4},  # type: ignore[arg-type]
    )
    layer = MemoryAsContext(config).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in layer.parameters():
            assert isinstance(value, Parameter)
            value.normal_(0, 0.5, generator=generator)
    return layer


def by_hand(layer: MemoryAsContext, x: Tensor, segment: int) -> Tensor:
    """x (T, hidden) -> (T, hidden)."""
    memory, inner, attention, eps = layer.memory, layer.memory.memory, layer.attention, layer.context_norm.eps
    gates = inner.gates
    heads = [slice(h * DIM, (h + 1) * DIM) for h in range(HEADS)]

    def projected(rows: list[Tensor], name: str) -> Tensor:
        """q, k or v of the last row, which the convolution mixes with the ones before it."""
        weight, conv = getattr(memory, name).weight, getattr(memory, name + "_conv").weight
        return convolved([weight @ row for row in rows], conv)

    def gate(row: Tensor, name: str, h: int) -> Tensor:
        made = getattr(gates, name).map
        return (made.weight @ row + made.bias)[h].sigmoid()

    def write(state: list[Matrix], rows: list[Tensor], chunk: int) -> None:
        k, v = projected(rows, "k"), projected(rows, "v")
        for h, cut in enumerate(heads):
            state[h].write(unit(k[cut]), v[cut], gate(rows[-1], "alpha", h), 0.4 * gate(rows[-1], "theta", h), chunk)

    def read(weights: list[Tensor], rows: list[Tensor]) -> Tensor:
        """What the layer around the memory gives for the last row: per-head norm, output gate."""
        q, out = projected(rows, "q"), F.silu(memory.gate.weight @ rows[-1])
        found = [rms(unit(q[cut]) @ weights[h], memory.norm.weight[h], eps) for h, cut in enumerate(heads)]
        return torch.cat(found) * out

    tokens = [] if layer.persistent is None else list(layer.persistent.tokens)
    state = [Matrix(inner.weights[0][h], inner.weights[0][h]) for h in range(HEADS)]
    for i in range(len(tokens)):  # P is read first, as one chunk
        write(state, tokens[: i + 1], len(tokens))
    for each in state:
        each.count = 0
    seen_x, seen_y = list(tokens), list(tokens)  # what the convolutions of x and of y have behind them
    p_keys, p_values = ([w @ p for p in tokens] for w in (attention.k.weight, attention.v.weight))
    outputs = []
    for first in range(0, x.shape[0], segment):
        before = [each.w for each in state]  # M_prev: frozen for the segment's retrievals
        h_rows: list[Tensor] = []
        s_rows: list[Tensor] = []
        for i, row in enumerate(x[first : first + segment]):
            seen_x.append(row)
            h_rows.append(rms(layer.memory_out.weight @ read(before, seen_x), layer.context_norm.weight, eps))
            s_rows.append(row)
            y = []
            for cut in heads:
                keys = [key[cut] for key in p_keys]
                values = [value[cut] for value in p_values]
                for rows in (h_rows, s_rows):
                    keys += [turned((attention.k.weight @ r)[cut], at, attention.theta) for at, r in enumerate(rows)]
                    values += [(attention.v.weight @ r)[cut] for r in rows]
                y.append(attended(turned((attention.q.weight @ row)[cut], i, attention.theta), keys, values))
            written = rms(layer.attention_out.weight @ torch.cat(y), layer.attention_norm.weight, eps)
            seen_y.append(written)
            write(state, seen_y, CHUNK)
            m = read([each.w for each in state], seen_y)
            o = [
                F.silu(rms(y[h], layer.y_norm.weight[h], eps)) * rms(m[cut], layer.m_norm.weight[h], eps)
                for h, cut in enumerate(heads)
            ]
            outputs.append(layer.out.weight @ torch.cat(o))
    return torch.stack(outputs)


@pytest.mark.parametrize("persistent", [0, 3])
@pytest.mark.parametrize(("length", "segment"), [(11, 4), (8, 8), (5, 2)])
@torch.no_grad()
def test_mac_is_its_definition(persistent: int, length: int, segment: int) -> None:
    layer = mac(persistent, segment)
    x = torch.randn(1, length, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, _ = layer(x)
    torch.testing.assert_close(found[0], by_hand(layer, x[0], segment), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("segment", [8, 32])
def test_what_the_last_tokens_ask_for_reaches_the_first_segment_in_full(segment: int) -> None:
    def gradients(limit: float | None) -> list[Tensor]:
        config = ModelConfig(
            variant="mac",
            num_layers=1,
            hidden_size=HIDDEN,
            num_heads=HEADS,
            vocab_size=16,
            segment_length=segment,
            persistent_tokens=1,
            memory={"expansion": 2, "chunk_size": 4, "theta_max": 0.2, "state_grad_clip": limit},  # type: ignore[arg-type]
        )
        model = build_model(config).double()
        tokens = torch.randint(16, (2, 64), generator=torch.Generator().manual_seed(2))
        model(tokens)[:, -4:].square().sum().backward()
        return [value.grad for value in model.parameters() if value.grad is not None]

    exact, default, tight = (gradients(limit) for limit in (None, MemoryConfig().state_grad_clip, 1e-6))
    for a, b in zip(default, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    assert any((a - b).norm() > 0.01 * b.norm() for a, b in zip(tight, exact, strict=True))


def test_before_training_a_token_attends_to_itself() -> None:
    layer = build_model(ModelConfig(variant="mac", hidden_size=256, num_heads=4, num_layers=1)).blocks[0].mixer
    attention = layer.attention
    assert torch.equal(attention.q.weight, attention.k.weight)
    x = F.rms_norm(torch.randn(1, 100, 256, generator=torch.Generator().manual_seed(3)), (256,))
    places = torch.arange(100)[None]
    q, (k, _) = attention.queries(x, places), attention.keys_values(x, places)
    weights = (torch.einsum("bthd,bshd->bhts", q, k) / 8).softmax(-1)
    assert weights.diagonal(dim1=-2, dim2=-1).mean() > 0.99
