"""Retention (MIRAS, section 4): how the past is kept.

`none` and `l2` keep the memory itself, by factors 1 and 1 - alpha. The others keep an accumulator A of what was
written, decayed by 1 - alpha; the memory is its link, worked out anew at the borders of chunks:

    lq_paper      W = A / ||A||_q^(q-2), as printed in the paper
    lq            W = sign(A) |A|^(r-1) / ||A||_r^(r-2) with 1/q + 1/r = 1, the mirror map's inverse
    kl            W = softmax(A) over the input axis; A is the logarithm of the memory
    elastic_net   W = sign(A) max(|A| - lambda, 0), which also takes the accumulator's place

Norms are per head and layer. Inside a chunk a token reads W_t = kept_t W_c + rho (A_t - kept_t A_c): what the chunk
began with fades, what it has written comes on top at the scale `rho` of the link. The chunk's last token reads the new
memory, so chunks of one token are the exact recurrence. The memory of kl stays on its simplex: see `chunked`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_dist.memory.spec import MemorySpec

FLOOR = 1e-6


def link(spec: MemorySpec, accumulator: Tensor) -> tuple[Tensor, Tensor | None]:
    """The memory W of an accumulator (..., d_in, d_out), and the scale rho (..., 1, 1) of writes inside a chunk."""
    if spec.retention == "kl":
        return accumulator.softmax(-2), None
    if spec.retention not in ("lq", "lq_paper"):
        return accumulator, None
    power = spec.q if spec.retention == "lq_paper" else spec.q / (spec.q - 1)
    # Squares with a floor far below any weight: |A|^(r-1) has no slope at 0.
    size = (accumulator.square() + FLOOR**2).sqrt() if spec.retention == "lq" else accumulator.abs()
    # The largest element first: high powers of small numbers leave float32.
    top = size.amax((-2, -1), keepdim=True).clamp_min(FLOOR).detach()
    norm = top * ((size / top) ** power).sum((-2, -1), keepdim=True).clamp_min(FLOOR**power) ** (1 / power)
    rho = norm.clamp_min(FLOOR) ** (2 - power)
    return accumulator * rho if spec.retention == "lq_paper" else accumulator * size ** (power - 2) * rho, rho


def at_chunk_end(spec: MemorySpec, accumulator: Tensor, chunk_size: int) -> Tensor:
    """What the accumulator becomes once its chunk is full."""
    if spec.retention != "elastic_net":
        return accumulator
    return torch.nn.functional.softshrink(accumulator, spec.threshold * chunk_size)


def has_fresh_end(spec: MemorySpec) -> bool:
    """Whether the last token of a full chunk reads the link of what it has written."""
    return spec.retention in ("lq", "lq_paper", "elastic_net")
