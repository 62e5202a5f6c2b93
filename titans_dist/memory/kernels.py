"""The memory by the Triton kernels of `titans_kernels`: how their call fits into the operator."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from titans_dist.memory.chunked import dual_form, from_carry, group_chunks, to_carry
from titans_dist.memory.grad_clip import StateGradClip
from titans_dist.memory.network import Norm
from titans_dist.memory.spec import MemorySpec
from titans_dist.memory.state import MemoryState
from titans_dist.memory.tokens import Tokens


def kernel_form(
    spec: MemorySpec,
    tokens: Tokens,
    norm: Norm | None,
    rows: Norm | None,
    state: MemoryState,
    start: MemoryState,
    chunk_size: int,
    read: str,
    recompute: bool,
    clip: StateGradClip | None,
) -> tuple[Tensor, MemoryState]:
    """As `dual_form`, with q, k, v of the tokens in their own dtype. norm: (H, D) or (D,) each; rows: (B H, 1, D).

    The rest of a chunk that an earlier call began has its gradients at an anchor; it goes through `dual_form`.
    """
    length, outputs = tokens.q.shape[1], []
    begin = min(length, chunk_size - state.position) if state.position else 0
    if begin:
        head = tokens.part(0, begin)
        head.q, head.k, head.v = head.q.float(), head.k.float(), head.v.float()
        y, state = dual_form(spec, head, rows, state, start, chunk_size, read, recompute, clip, False)
        outputs.append(y.to(tokens.q.dtype))
    whole = begin + (length - begin) // chunk_size * chunk_size
    for first, last in ((begin, whole), (whole, length)):
        if first == last:
            continue
        if clip is not None and (first or clip.is_shared):
            state = _limited(state, clip)
        part = tokens.part(first, last)
        y, after = _write_and_read(spec, part, norm, state, start, chunk_size, read, recompute, clip)
        if last - first < chunk_size:
            after = _inside(part, state, start, after)
        outputs.append(y)
        state = after
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)), state


def _write_and_read(
    spec: MemorySpec,
    tokens: Tokens,
    norm: Norm | None,
    state: MemoryState,
    start: MemoryState,
    chunk_size: int,
    read: str,
    recompute: bool,
    clip: StateGradClip | None,
) -> tuple[Tensor, MemoryState]:
    from titans_kernels.memory import chunked_memory

    y, weights, momentum = chunked_memory(
        tokens.q,
        tokens.k,
        tokens.v,
        weights=state.weights,
        momentum=state.momentum,
        alpha=tokens.alpha,
        eta=tokens.eta,
        theta=tokens.theta,
        limit=tokens.delta,
        norm=norm,
        starts=tokens.starts,
        begin=(start.weights, start.momentum),
        chunk_size=chunk_size,
        read=read,
        activation=spec.activation,
        loss=spec.bias,
        recompute=recompute,
        largest=None if clip is None else lambda: clip.largest,
        group_size=group_chunks(chunk_size) * chunk_size,
    )
    return y, MemoryState(weights, momentum)


def _limited(state: MemoryState, clip: StateGradClip) -> MemoryState:
    """A state between two groups, as it is; the gradient that goes back to it is limited."""
    carry = to_carry(state)
    return from_carry(replace(carry, slots=clip.slots(carry.slots)), *state.weights[0].shape[:2])


def _inside(tokens: Tokens, state: MemoryState, start: MemoryState, after: MemoryState) -> MemoryState:
    """The state after the tokens of a chunk that is not complete, from `state` at its beginning."""
    left = torch.ones_like(tokens.theta) if tokens.alpha is None else 1 - tokens.alpha
    anchor = state.weights
    if tokens.starts is not None:
        count = tokens.starts.cumsum(1)
        left = torch.where((count == count[:, -1:]).unsqueeze(-1), left, 1.0)
        is_new = (count[:, -1] > 0)[:, None, None, None]
        anchor = [torch.where(is_new, new, old) for new, old in zip(start.weights, anchor, strict=True)]
    return replace(after, anchor=anchor, kept=left.prod(1), position=tokens.q.shape[1])
