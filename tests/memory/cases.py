"""Arguments of the memory operator for the tests, the call itself, and how two results are compared."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_dist.memory import MemorySpec, MemoryState, neural_memory

EXACT = 1e-10
Result = tuple[Tensor, MemoryState]

PRESETS = (
    "titans", "moneta", "yaad", "memora", "linear_attention", "retnet", "deltanet", "gated_deltanet", "mamba2",
    "ttt_linear", "ttt_mlp", "longhorn",
)  # fmt: skip

KINDS: dict[str, MemorySpec] = {name: MemorySpec.preset(name) for name in PRESETS} | {
    "deep": MemorySpec(depth=3, expansion=2),
    "plain": MemorySpec(depth=2, expansion=2, residual=False),
    "l1": MemorySpec(expansion=2, bias="l1"),
    "dot_mlp": MemorySpec(expansion=2, bias="dot"),
    "lq": MemorySpec(expansion=2, retention="lq"),
    "lq_paper_momentum": MemorySpec(expansion=2, bias="lp", retention="lq_paper"),
    "kl_momentum": MemorySpec(expansion=2, retention="kl"),
    "elastic_net": MemorySpec(expansion=2, retention="elastic_net", threshold=0.01),
    "channel_wise": MemorySpec(expansion=2, channel_wise=True),
    "channel_wise_matrix": MemorySpec(depth=1, channel_wise=True),
    "token_dot": MemorySpec.preset("retnet", anchor="token"),
    "token_decay_after": MemorySpec.preset("gated_deltanet", decay="after"),
    "implicit_gated": MemorySpec.preset("gated_deltanet", implicit=True),
}
"""Every preset, and every choice that no preset makes."""


@dataclass
class Case:
    """Arguments of one call in the library's layout: (B, T, H, D), gates (B, T, H), weights (H, d_in, d_out).

    Gates are (B, T, H, D) where the memory is channel-wise. Gates that a memory does not use are there all the same.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    alpha: Tensor
    eta: Tensor
    theta: Tensor
    delta: Tensor
    weights: list[Tensor]
    gain: Tensor
    bias: Tensor
    state: MemoryState | None = None
    start: MemoryState | None = None
    starts: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Everything with a gradient."""
        tokens = [self.q, self.k, self.v, self.alpha, self.eta, self.theta, self.delta]
        states = [x for s in (self.state, self.start) if s is not None for x in (*s.weights, *s.momentum)]
        return [*tokens, *self.weights, self.gain, self.bias, *states]

    def part(self, begin: int, end: int | None) -> Case:
        """The tokens from `begin` up to `end` alone."""
        tokens = ("q", "k", "v", "alpha", "eta", "theta", "delta")
        starts = None if self.starts is None else self.starts[:, begin:end]
        return replace(self, **{name: getattr(self, name)[:, begin:end] for name in tokens}, starts=starts)

    def perturbed(self, rows: slice | int, tokens: slice | int) -> Case:
        """A copy in which every input of the given rows and tokens is another."""
        changed = {}
        for field in fields(self)[:7]:
            x = getattr(self, field.name).detach().clone()
            x[rows, tokens] = x[rows, tokens] * 0.5 + 0.01
            changed[field.name] = x
        return replace(self, **changed)


def random_case(spec: MemorySpec, batch: int, length: int, heads: int, dim: int, seed: int) -> Case:
    """Float64 arguments at which the recurrence stays small, all requiring gradients."""
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    gate = (batch, length, heads, dim) if spec.channel_wise else (batch, length, heads)
    case = Case(
        q=F.normalize(normal(batch, length, heads, dim), dim=-1),
        k=F.normalize(normal(batch, length, heads, dim), dim=-1),
        v=normal(batch, length, heads, dim),
        alpha=0.3 * uniform(*gate),
        eta=0.9 * uniform(*gate),
        theta=0.01 + 0.05 * uniform(*gate),
        delta=0.5 * dim**0.5 + 1.5 * uniform(batch, length, heads),  # about half of all errors are longer
        weights=[normal(heads, *shape) * _scale(spec, shape) for shape in spec.shapes(dim)],
        gain=0.5 + uniform(heads, dim),
        bias=0.1 * normal(heads, dim),
    )
    for tensor in case.tensors():
        tensor.requires_grad_()
    return case


def _scale(spec: MemorySpec, shape: tuple[int, int]) -> float:
    """Standard deviation of a layer's weights; the link of lq makes a few large ones of many small ones."""
    return (0.2 if spec.retention == "lq" else 1.0) * shape[0] ** -0.5


def random_state(spec: MemorySpec, batch: int, heads: int, dim: int, seed: int) -> MemoryState:
    """A state at a chunk's border, requiring gradients."""
    g = torch.Generator().manual_seed(seed)

    def one(shape: tuple[int, int], scale: float) -> Tensor:
        return (torch.randn(batch, heads, *shape, generator=g, dtype=torch.float64) * scale).requires_grad_()

    shapes = spec.shapes(dim)
    return MemoryState(
        [one(s, _scale(spec, s)) for s in shapes], [one(s, 0.1) for s in shapes] if spec.momentum else []
    )


def operator(spec: MemorySpec, case: Case, chunk_size: int, read: str = "after", **options: object) -> Result:
    """The library's operator. Gates that the memory does not use are left out, as callers may."""
    arguments: dict[str, object] = dict(
        spec=spec,
        weights=case.weights,
        alpha=None if spec.retention == "none" else case.alpha,
        eta=case.eta if spec.momentum else None,
        theta=case.theta,
        delta=case.delta if spec.bias == "huber" else None,
        norm=(case.gain, case.bias) if spec.residual else None,
        state=case.state,
        start=case.start,
        starts=case.starts,
        chunk_size=chunk_size,
        read=read,
    )
    return neural_memory(case.q, case.k, case.v, **{**arguments, **options})  # type: ignore[arg-type]


def in_parts(spec: MemorySpec, case: Case, cuts: list[int], chunk_size: int, **options: object) -> Result:
    """The same sequence in several calls, the state carried from each to the next."""
    outputs, state = [], case.state
    for begin, end in zip([0, *cuts], [*cuts, case.q.shape[1]], strict=True):
        y, state = operator(spec, case.part(begin, end), chunk_size, **{**options, "state": state})
        outputs.append(y)
    assert state is not None
    return torch.cat(outputs, 1), state


def assert_equal(found: Result, wanted: Result, tolerance: float = EXACT) -> None:
    """Outputs and states are equal, inside a chunk also where its gradients are taken."""
    assert found[1].position == wanted[1].position
    pairs = [(found[0], wanted[0])]
    for name in ("weights", "momentum", "anchor"):
        pairs += zip(getattr(found[1], name), getattr(wanted[1], name), strict=True)
    if found[1].kept is not None and wanted[1].kept is not None:
        pairs.append((found[1].kept, wanted[1].kept))
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def gradients(case: Case, result: Result) -> list[Tensor | None]:
    """Gradients, at every tensor of the case, of a fixed random projection of everything the operator returns."""
    y, state = result
    g = torch.Generator().manual_seed(99)
    total = sum(
        (x * torch.randn(x.shape, generator=g, dtype=x.dtype)).sum() for x in (y, *state.weights, *state.momentum)
    )
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, case.tensors(), allow_unused=True))


def assert_equal_gradients(found: list[Tensor | None], wanted: list[Tensor | None], tolerance: float = 1e-9) -> None:
    """Where one has no gradient, the other has none either, or zeros."""
    assert any(x is not None and x.count_nonzero() for x in wanted)
    for a, b in zip(found, wanted, strict=True):
        if a is None or b is None:
            assert all(x is None or not x.count_nonzero() for x in (a, b))
        else:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
