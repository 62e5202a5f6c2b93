"""How the memories of a model are doing, seen while it runs.

    with collect() as records:
        model(tokens)
    records.summary(model)    # {"blocks.0.mixer.memory.memory": {"surprise_before": 1.9, ...}, ...}

Nothing is collected, and nothing costs time, outside of such a block. Of each memory the last call counts. All numbers
are worked out on the device when the block ends, without gradients; `summary` fetches them all at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from titans_dist.memory import MemorySpec, MemoryState
from titans_dist.memory.bias import inner_loss
from titans_dist.memory.network import Norm, apply
from titans_dist.memory.retention import link

BINS = 16
SATURATED = 0.0001
"""A sigmoid that is this near to 0 or to 1 hardly learns any more: its slope is less than this."""

NUMBERS = (
    "surprise_before",
    "surprise_after",
    "w_norm",
    "s_norm",
    "horizon",
    *(f"{gate}_{what}" for gate in ("alpha", "eta", "theta") for what in ("mean", "saturated")),
)
"""What `summary` has for each memory; a number that the memory does not have is None.

surprise_before, surprise_after: mean inner loss of the call's last chunk of pairs, at the memory that the call began
with and at the one that it left. Where the call is one chunk, that is before and after the write.
w_norm, s_norm: Frobenius norm of all layers of one memory (of the running surprise), mean over sequences and heads.
horizon: tokens after which forgetting has left 1/e of what was written, 1 / mean(-log(1 - alpha)).
*_mean; *_saturated: share of the gates whose sigmoid is within SATURATED of 0 or 1.
"""
HISTOGRAMS = ("alpha", "eta", "theta")
"""`summary` has them as {"low", "high", "counts"}: how many of the gates are in each of BINS bins of equal width."""


@dataclass
class Call:
    """One call of a memory: see `observe`."""

    spec: MemorySpec
    k: Tensor
    v: Tensor
    alpha: Tensor | None
    eta: Tensor | None
    theta: Tensor
    theta_max: float | None
    delta: Tensor | None
    norm: Norm | None
    start_state: MemoryState
    end_state: MemoryState
    chunk_size: int

    def absent(self) -> set[str]:
        """Which of NUMBERS and HISTOGRAMS this memory does not have."""
        without = {gate for gate in ("alpha", "eta") if getattr(self, gate) is None}
        absent = without | {f"{gate}_{what}" for gate in without for what in ("mean", "saturated")}
        absent |= {"horizon"} if self.alpha is None else set()
        absent |= {"theta_saturated"} if self.theta_max is None else set()
        return absent | (set() if self.end_state.momentum else {"s_norm"})


class Records:
    """The last call of each memory, and what became of it."""

    def __init__(self) -> None:
        self._calls: dict[nn.Module, Call] = {}
        self._found: dict[nn.Module, tuple[set[str], Tensor]] = {}

    def add(self, module: nn.Module, call: Call) -> None:
        """Take note of a call; an earlier one of the same module is forgotten."""
        self._calls[module] = call

    @torch.no_grad()
    def finish(self) -> None:
        """Work out the numbers of each call, and let go of its tensors."""
        self._found |= {module: (call.absent(), _numbers(call)) for module, call in self._calls.items()}
        self._calls = {}

    def summary(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """Numbers and histograms by the path of each memory in `model`."""
        paths = [(path, module) for path, module in model.named_modules() if module in self._found]
        if not paths:
            return {}
        rows = torch.stack([self._found[module][1] for _, module in paths]).tolist()
        return {
            path: {name: None if name in self._found[module][0] else value for name, value in _named(row).items()}
            for (path, module), row in zip(paths, rows, strict=True)
        }


_active: Records | None = None


@contextmanager
def collect() -> Iterator[Records]:
    """Collect from all memories that are called inside the block."""
    global _active
    outer, _active = _active, Records()
    try:
        yield _active
        _active.finish()
    finally:
        _active = outer


def observe(
    module: nn.Module,
    *,
    spec: MemorySpec,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None,
    eta: Tensor | None,
    theta: Tensor,
    delta: Tensor | None,
    norm: Norm | None,
    start_state: MemoryState,
    end_state: MemoryState,
    chunk_size: int,
    theta_max: float | None = None,
) -> None:
    """Hand one call of a memory to the collector that is active, if any.

    theta_max: theta's largest value where theta is a gate; None where it is a constant.
    """
    if _active is not None:
        _active.add(
            module, Call(spec, k, v, alpha, eta, theta, theta_max, delta, norm, start_state, end_state, chunk_size)
        )


def _numbers(call: Call) -> Tensor:
    """NUMBERS, then low, high and counts of each of HISTOGRAMS, as one tensor; 0 for what there is not."""
    weights = [link(call.spec, w)[0] for w in call.end_state.weights]
    dtype = weights[0].dtype
    nothing = torch.zeros((), dtype=dtype, device=weights[0].device)
    before = [link(call.spec, w)[0] for w in call.start_state.weights]
    surprise = [_surprise(call, memory) for memory in (before, weights)]
    norms = [_norm(weights), _norm(call.end_state.momentum) if call.end_state.momentum else nothing]
    horizon = nothing if call.alpha is None else 1 / -torch.log1p(-call.alpha.to(dtype)).mean()
    shares, histograms = [], []
    for gate, largest in ((call.alpha, 1.0), (call.eta, 1.0), (call.theta, call.theta_max or 1.0)):
        if gate is None:
            shares += [nothing, nothing]
            histograms += [nothing.expand(2 + BINS)]
            continue
        x = gate.to(dtype)
        share = x / largest
        shares += [x.mean(), ((share < SATURATED) | (share > 1 - SATURATED)).to(dtype).mean()]
        low, high = x.aminmax()
        scaled = (x - low) / (high - low).clamp_min(torch.finfo(dtype).tiny)
        histograms += [low.view(1), high.view(1), torch.histc(scaled, BINS, 0, 1)]
    return torch.cat([torch.stack([*surprise, *norms, horizon, *shares]), *histograms])


def _surprise(call: Call, weights: list[Tensor]) -> Tensor:
    """Mean inner loss of the last chunk's pairs at a memory (B, H, d_in, d_out)."""
    count = min(call.k.shape[1], call.end_state.position or call.chunk_size)
    k, v = (x[:, -count:].transpose(1, 2).to(weights[0].dtype) for x in (call.k, call.v))
    delta = None if call.delta is None else call.delta[:, -count:].transpose(1, 2).to(k.dtype)
    norm = None
    if call.norm is not None and call.spec.residual:
        gain, bias = (x.to(k.dtype) for x in call.norm)
        norm = (gain.unsqueeze(-2), bias.unsqueeze(-2))
    return inner_loss(call.spec, apply(call.spec, weights, k, norm), v, delta).mean()


def _norm(layers: list[Tensor]) -> Tensor:
    squares = torch.stack([x.square().sum((-2, -1)) for x in layers])
    return squares.sum(0).sqrt().mean()


def _named(row: list[float]) -> dict[str, Any]:
    """What `_numbers` gave, by name."""
    found: dict[str, Any] = {name: _rounded(value) for name, value in zip(NUMBERS, row, strict=False)}
    for i, name in enumerate(HISTOGRAMS):
        low, high, *counts = row[len(NUMBERS) + i * (2 + BINS) :][: 2 + BINS]
        found[name] = {"low": _rounded(low), "high": _rounded(high), "counts": [round(x) for x in counts]}
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
