"""TNT equals its definition, written with explicit loops: one head, one token at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.layers.definitions import Matrix, unit
from titans_dist.config import ModelConfig
from titans_dist.layers.inner_memory import InnerMemory
from titans_dist.layers.state import expand
from titans_dist.layers.tnt import TNTMemory

HEADS, DIM, CHUNK, GLOBAL, SHARD = 2, 4, 2, 6, 4


def tnt() -> TNTMemory:
    config = ModelConfig(
        variant="lmm",
        hidden_size=HEADS * DIM,
        num_heads=HEADS,
        memory={  # type: ignore[arg-type]
            "depth": 1,
            "residual": False,
            "momentum": False,
            "chunk_size": CHUNK,
            "global_chunk_size": GLOBAL,
            "shard_size": SHARD,
            "theta_max": 0.3,
        },
    )
    layer, generator = TNTMemory(config).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in layer.parameters():
            value.normal_(0, 0.5, generator=generator)
    return layer


def by_hand(layer: TNTMemory, x: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: list[bool]) -> Tensor:
    """x (T, hidden); q, k, v (T, H, D) -> y (T, H, D)."""

    def gates(inner: InnerMemory, t: int, h: int, largest: float) -> tuple[Tensor, Tensor]:
        alpha, theta = (
            (made.map.weight @ x[t] + made.map.bias)[h].sigmoid() for made in (inner.gates.alpha, inner.gates.theta)
        )
        return alpha, theta * largest

    y = torch.zeros_like(q)
    for h in range(HEADS):
        whole, learned = layer.everything.weights[0][h], layer.shard.weights[0][h]
        everything, seen = Matrix(whole, whole), whole
        for t in range(x.shape[0]):
            if starts[t]:
                everything.w = everything.anchor = seen = whole
            if t % SHARD == 0 or starts[t]:
                local, keys = Matrix(learned, learned, t), torch.zeros(DIM, DIM, dtype=x.dtype)
            if t % GLOBAL == 0:
                seen = everything.w
            everything.write(k[t, h], v[t, h], *gates(layer.everything, t, h, 0.3 * CHUNK / GLOBAL), GLOBAL)
            local.write(k[t, h], v[t, h], *gates(layer.shard, t, h, 0.3), CHUNK)
            keys = keys + torch.outer(k[t, h], k[t, h]) / k[t, h].square().sum()
            y[t, h] = q[t, h] @ seen + (keys @ q[t, h]) @ local.w
    return y


@pytest.mark.parametrize("starts", [[], [1, 6, 8, 9], [4, 12]], ids=["one", "anywhere", "borders"])
@pytest.mark.parametrize("borders", [[], [3, 4, 11], [8]], ids=["whole", "parts", "halves"])
@torch.no_grad()
def test_tnt_is_its_definition(starts: list[int], borders: list[int]) -> None:
    layer, length = tnt(), 15
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, length, HEADS * DIM, dtype=torch.float64, generator=generator)
    q, k, v = (torch.randn(1, length, HEADS, DIM, dtype=torch.float64, generator=generator) for _ in range(3))
    k = torch.stack([torch.stack([unit(head) for head in token]) for token in k[0]])[None]
    begins = torch.zeros(1, length, dtype=torch.bool)
    begins[0, starts] = True
    start = expand(layer.learned_state(1), 1)
    state, found = start, []
    for first, last in zip([0, *borders], [*borders, length], strict=True):
        part = [a[:, first:last] for a in (x, q, k, v)]
        y, state = layer(*part, state, start, begins[:, first:last] if starts else None)
        found.append(y[0])
    wanted = by_hand(layer, x[0], q[0], k[0], v[0], begins[0].tolist())
    torch.testing.assert_close(torch.cat(found), wanted, rtol=1e-10, atol=1e-10)
