"""The memory recurrence by autograd, one token, one head and one sequence at a time: slow, obvious and independent.

Only the formulas of the papers are here (Titans eqs 12-18, MIRAS section 4, with this project's choices): the inner
loss is differentiated by torch.autograd, every token's memory is materialized, nothing is batched. Of a `MemorySpec`
only the names and numbers of its fields are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.memory.cases import Case
from titans_dist.memory import MemorySpec, MemoryState

ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "identity": lambda x: x,
}
Matrices = list[Tensor]


def memory(spec: MemorySpec, x: Tensor, weights: Matrices, norm: tuple[Tensor, Tensor]) -> Tensor:
    """f_W(x) for one vector (D,)."""
    h = x
    for i, w in enumerate(weights):
        h = h @ w
        if i + 1 < len(weights):
            h = ACTIVATION[spec.activation](h)
    return x + F.layer_norm(h, h.shape, *norm, eps=1e-6) if spec.residual else h


def inner_gradient(
    spec: MemorySpec, weights: Matrices, k: Tensor, v: Tensor, delta: Tensor, norm: tuple[Tensor, Tensor]
) -> Matrices:
    """u = dl/dW of one pair. l1 and lp are defined by their gradient at f, which autograd pulls back to the weights."""
    f = memory(spec, k, weights, norm)
    e = f - v
    if spec.bias == "l1":
        at_output = torch.tanh(spec.sharpness * e)
        return list(torch.autograd.grad(f, weights, at_output, create_graph=True))
    if spec.bias == "lp":
        at_output = spec.p * torch.tanh(spec.sharpness * e) * (e * e + 1e-6) ** ((spec.p - 1) / 2)
        return list(torch.autograd.grad(f, weights, at_output, create_graph=True))
    if spec.bias == "l2":
        loss = (e * e).sum()
    elif spec.bias == "dot":
        loss = -2 * (f * v).sum()
    else:
        assert spec.bias == "huber"
        size = e.norm()
        loss = size**2 if size <= delta else 2 * delta * size - delta**2
    return list(torch.autograd.grad(loss, weights, create_graph=True))


def link(spec: MemorySpec, a: Tensor) -> tuple[Tensor, Tensor | float]:
    """The memory W of an accumulator (d_in, d_out), and the scale rho of what is written until the next link."""
    if spec.retention == "kl":
        return torch.softmax(a, dim=0), 0.0
    if spec.retention == "lq_paper":
        rho = 1 / (a.abs() ** spec.q).sum().pow(1 / spec.q).clamp_min(1e-6) ** (spec.q - 2)
        return a * rho, rho
    if spec.retention == "lq":
        r = spec.q / (spec.q - 1)
        size = (a * a + 1e-12).sqrt()
        rho = 1 / (size**r).sum().pow(1 / r).clamp_min(1e-6) ** (r - 2)
        return a * size ** (r - 2) * rho, rho
    return a, 1.0


def soft_threshold(a: Tensor, by: float) -> Tensor:
    return a.sign() * (a.abs() - by).clamp_min(0)


def on_layer(spec: MemorySpec, gate: Tensor, layer: int) -> Tensor:
    """A gate as a factor of a layer's matrix: per channel it acts on the axis that has the head's D channels."""
    if not spec.channel_wise:
        return gate
    is_output = spec.depth > 1 and layer == spec.depth - 1
    return gate[None, :] if is_output else gate[:, None]


@dataclass
class Token:
    """One token of one head: q, k, v (D,), gates () or (D,), delta (), and whether a document begins with it."""

    q: Tensor
    k: Tensor
    v: Tensor
    alpha: Tensor
    eta: Tensor
    theta: Tensor
    delta: Tensor
    begins: bool


def one_head(
    spec: MemorySpec,
    tokens: list[Token],
    norm: tuple[Tensor, Tensor],
    now: tuple[Matrices, Matrices],
    start: tuple[Matrices, Matrices],
    chunk_size: int,
    read: str,
) -> tuple[Tensor, Matrices, Matrices, Matrices]:
    """y (T, D); after the last token: accumulators A (without a link: W itself), momentum S, and the chunk's anchor."""
    layers = range(spec.depth)
    a, s = now  # A and S, one matrix per layer
    outputs = []
    anchor: Matrices = []  # A where the running chunk's gradients are taken
    beta: list[Tensor | float] = []  # share of the anchor that forgetting has left

    def visible() -> Matrices:
        """The memory inside a chunk: what the chunk began with fades, what it has written comes on top."""
        linked = [link(spec, x) for x in anchor]
        if spec.retention == "kl":
            return [w for w, _ in linked]
        return [beta[i] * w + rho * (a[i] - beta[i] * anchor[i]) for i, (w, rho) in enumerate(linked)]

    for t, token in enumerate(tokens):
        is_first, is_last = t % chunk_size == 0, t % chunk_size == chunk_size - 1
        if token.begins:
            a, s = start
        if token.begins or is_first:
            anchor, beta = a, [1.0 for _ in layers]
        before = visible()
        at_start = [link(spec, x)[0] for x in anchor]

        keep = [1 - on_layer(spec, token.alpha, i) if spec.retention != "none" else 1.0 for i in layers]
        if spec.anchor == "chunk":
            at = at_start
        else:
            at = [keep[i] * a[i] if spec.decay == "before" else a[i] for i in layers]
        u = inner_gradient(spec, at, token.k, token.v, token.delta, norm)
        theta = [on_layer(spec, token.theta, i) for i in layers]
        if spec.implicit:
            theta = [x / (1 + 2 * x * (token.k * token.k).sum()) for x in theta]
        eta = [on_layer(spec, token.eta, i) if spec.momentum else 0.0 for i in layers]
        s = [eta[i] * s[i] - theta[i] * u[i] for i in layers]
        a = [keep[i] * a[i] + s[i] for i in layers]
        beta = [keep[i] * beta[i] for i in layers]

        if spec.retention == "kl" and is_first:
            anchor = a  # the first token is exact; the others' gradients and reads are where it leads
        if spec.retention == "elastic_net" and is_last:
            a = [soft_threshold(x, spec.threshold * chunk_size) for x in a]
        after = [link(spec, x)[0] for x in a] if is_last and spec.retention != "kl" else visible()
        seen = {"after": after, "before": before, "start": at_start}[read]
        outputs.append(memory(spec, token.q, seen, norm))
    return torch.stack(outputs), a, s, anchor if len(tokens) % chunk_size else []


def run(spec: MemorySpec, case: Case, chunk_size: int, read: str = "after") -> tuple[Tensor, MemoryState]:
    """y (B, T, H, D) and the state after the last token. Differentiable in every tensor of the case."""
    batch, length, heads, _ = case.q.shape
    learned = ([w.expand(batch, *w.shape) for w in case.weights],) * 2
    start = learned[0], [torch.zeros_like(w) for w in learned[0]]
    if case.start is not None:
        start = case.start.weights, case.start.momentum
    now = start if case.state is None else (case.state.weights, case.state.momentum)
    done: list[list[tuple[Tensor, Matrices, Matrices, Matrices]]] = []
    for b in range(batch):
        done.append([])
        for h in range(heads):
            tokens = [
                Token(
                    *(x[b, t, h] for x in (case.q, case.k, case.v, case.alpha, case.eta, case.theta, case.delta)),
                    begins=case.starts is not None and bool(case.starts[b, t]),
                )
                for t in range(length)
            ]
            norm = case.gain[h], case.bias[h]
            mine = [([x[b, h] for x in ws], [x[b, h] for x in ss] or [0.0] * spec.depth) for ws, ss in (now, start)]
            done[b].append(one_head(spec, tokens, norm, *mine, chunk_size, read))  # type: ignore[arg-type]

    def gathered(part: int) -> Matrices:
        """One (B, H, d_in, d_out) per layer."""
        per_layer = range(len(done[0][0][part]))
        return [torch.stack([torch.stack([head[part][i] for head in row]) for row in done]) for i in per_layer]

    y = torch.stack([torch.stack([head[0] for head in row], 1) for row in done])
    momentum = gathered(2) if spec.momentum else []
    return y, MemoryState(gathered(1), momentum, gathered(3), position=length % chunk_size)
