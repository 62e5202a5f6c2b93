"""The memory token by token: the definition that every faster form must equal.

For token t in the chunk that starts at the memory W_c (Titans, eqs 12-18):

    u_t = dl/dW (W_c; k_t, v_t)
    S_t = eta_t S_{t-1} - theta_t u_t
    W_t = (1 - alpha_t) W_{t-1} + S_t
    y_t = f(W_t; q_t)   (read="after")   or   f(W_{t-1}; q_t)   (read="before")   or   f(W_c; q_t)   (read="start")

Some retentions keep an accumulator in W's place, see `retention`; some memories take u_t elsewhere, see `MemorySpec`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from titans_dist.memory.network import Norm, apply, descent
from titans_dist.memory.retention import at_chunk_end, has_fresh_end, link
from titans_dist.memory.spec import MemorySpec
from titans_dist.memory.state import MemoryState
from titans_dist.memory.tokens import Tokens


def recurrence(
    spec: MemorySpec,
    tokens: Tokens,
    norm: Norm | None,
    state: MemoryState,
    start: MemoryState,
    chunk_size: int,
    read: str,
) -> tuple[Tensor, MemoryState]:
    """y (B, T, H, D) and the state after token T. `norm`: (B H, 1, D) each."""
    batch, length = tokens.q.shape[:2]
    if norm is not None:
        norm = (norm[0].unflatten(0, (batch, -1)), norm[1].unflatten(0, (batch, -1)))
    outputs = []
    for t in range(length):
        if tokens.starts is not None:
            state = _restart(spec, state, start, tokens.starts[:, t, None, None, None])
        token = tokens.part(t, t + 1)
        token.starts = None
        heads_first = (None if x is None else x.transpose(1, 2) for x in vars(token).values())
        y, state = step(spec, Tokens(*heads_first), norm, state, chunk_size, read)  # type: ignore[arg-type]
        outputs.append(y.transpose(1, 2))
    return torch.cat(outputs, 1), state


def step(
    spec: MemorySpec, token: Tokens, norm: Norm | None, state: MemoryState, chunk_size: int, read: str
) -> tuple[Tensor, MemoryState]:
    """One token, heads first: q, k, v (B, H, 1, D), gates (B, H, 1) or (B, H, 1, D) -> y (B, H, 1, D), state after."""
    q, k, v, alpha, eta, theta, delta = token.q, token.k, token.v, token.alpha, token.eta, token.theta, token.delta
    layers, old = range(spec.depth), state.weights
    fresh = state.position == 0
    anchor = old if fresh else state.anchor
    kept = torch.ones_like(k[..., 0]) if state.kept is None or fresh else state.kept[..., None]
    keep = [1 - _on_layer(spec, alpha, i) if alpha is not None else None for i in layers]
    linked = [link(spec, a) for a in anchor]
    memory = [w for w, _ in linked]
    at = memory
    if spec.anchor == "token":
        at = old if spec.decay == "after" or alpha is None else [w * (1 - alpha[..., None]) for w in old]
    inputs, deltas = descent(spec, at, k, v, delta, norm)
    if spec.implicit:
        theta = theta / (1 + 2 * theta * k.square().sum(-1))
    momentum = [_on_layer(spec, theta, i) * (inputs[i].mT @ deltas[i]) for i in layers]  # without momentum, the write
    if eta is not None:
        momentum = [_on_layer(spec, eta, i) * state.momentum[i] + momentum[i] for i in layers]
    weights = [
        momentum[i] + (old[i] if keep_i is None else keep_i * old[i]) for i, keep_i in zip(layers, keep, strict=True)
    ]

    def inside(accumulators: list[Tensor], kept: Tensor) -> list[Tensor]:
        """The memory inside a chunk: what it began with fades, what it has written comes on top."""
        if spec.retention == "kl":
            return [link(spec, a)[0] for a in anchor]
        return [
            x if rho is None else kept[..., None] * (w - rho * a) + rho * x
            for x, a, (w, rho) in zip(accumulators, anchor, linked, strict=True)
        ]

    before = memory if read == "start" or fresh else inside(old, kept)
    if alpha is not None and not spec.channel_wise:
        kept = kept * (1 - alpha)
    if spec.retention == "kl" and fresh:  # the chunk's first token is exact; the rest of the chunk stays there
        anchor = weights
    position = (state.position + 1) % chunk_size
    if position == 0:
        weights = [at_chunk_end(spec, w, chunk_size) for w in weights]
    seen = before
    if read == "after":
        is_new = position == 0 and has_fresh_end(spec)
        seen = [link(spec, w)[0] for w in weights] if is_new else inside(weights, kept)
    after = MemoryState(weights, momentum if eta is not None else [])
    if position:
        after = replace(after, anchor=anchor, kept=kept[..., 0], position=position)
    return apply(spec, seen, q, norm), after


def _restart(spec: MemorySpec, state: MemoryState, start: MemoryState, new: Tensor) -> MemoryState:
    """The state before a token that begins a document in the rows `new` (B, 1, 1, 1)."""

    def chosen(new_ones: list[Tensor], old_ones: list[Tensor]) -> list[Tensor]:
        return [torch.where(new, a, b) for a, b in zip(new_ones, old_ones, strict=True)]

    return replace(
        state,
        weights=chosen(start.weights, state.weights),
        momentum=chosen(start.momentum, state.momentum),
        anchor=chosen(start.weights, state.anchor) if state.position else [],
        kept=torch.where(new[..., 0, 0], 1.0, state.kept) if state.kept is not None else None,
    )


def _on_layer(spec: MemorySpec, gate: Tensor, layer: int) -> Tensor:
    """A gate of one token (B, H, 1) or (B, H, 1, D) as a factor of a layer's matrix (B, H, d_in, d_out)."""
    if not spec.channel_wise:
        return gate[..., None]
    return gate if spec.depth > 1 and layer == spec.depth - 1 else gate.mT
