"""The gates of a chunk in closed form: what reaches token t, and the chunk's end, of every write and of the past.

The memory's past is W_c and, with momentum, S_c: 1 or 2 slots, which the gates mix. Where documents begin inside the
chunk, what they begin with is more past: the slots of the chunk's start, then those of a document's start.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class ChunkGates:
    """Coefficients of chunks of b tokens. With the inner gradients u_i, the slots X_m, and X' those at the chunk's end:

        W_t = sum_m past_tm X_m - sum_i write_ti u_i          token t's memory
        X'_n = sum_m keep_nm X_m - sum_i add_in u_i

    past (..., b, m); write (..., b, b), lower triangular: this is the causal mask; keep (..., n, m); add (..., b, n).
    kept (..., b): what forgetting has left of the memory since the chunk's start, or the document's.
    """

    past: Tensor
    write: Tensor | None
    keep: Tensor
    add: Tensor
    kept: Tensor

    def unbind(self) -> list[ChunkGates]:
        """The gates of each chunk alone, along the first dimension."""
        return [ChunkGates(*chunk) for chunk in zip(*(x.unbind(0) for x in vars(self).values()), strict=True)]


def decay_products(factor: Tensor, same: Tensor | None) -> tuple[Tensor, Tensor]:
    """Products of factors (..., b) within a chunk: from its start, (..., b), and between tokens, (..., b, b).

    Entry (t, s) of the second is prod_{s < j <= t} factor_j for s <= t (1 on the diagonal) and 0 above it. Sums of
    logarithms over each span, never a quotient of products or a difference of sums: those underflow or cancel.
    `same` (..., b, b): whether t and s are of one document; the first then counts from the document's start, the
    second is 0 between documents.
    """
    b = factor.shape[-1]
    log = factor.clamp_min(torch.finfo(factor.dtype).tiny).log()
    lower = torch.ones(b, b, dtype=factor.dtype, device=factor.device).tril()
    spans = lower @ (log.unsqueeze(-1) * lower.tril(-1))  # sums over j <= t of the logarithms with j > s
    mask = lower if same is None else lower * same
    return (mask @ log.unsqueeze(-1)).squeeze(-1).exp(), spans.exp() * mask


def chunk_gates(alpha: Tensor | None, eta: Tensor | None, theta: Tensor, document: Tensor | None = None) -> ChunkGates:
    """Gates (..., b) -> ChunkGates. `alpha` is the share forgotten; None means no forgetting, no momentum.

    `document` (..., b) counts the documents that have begun in the chunk up to each token; 0 is the one from before.
    """
    same = None if document is None else (document.unsqueeze(-1) == document.unsqueeze(-2)).to(theta.dtype)
    kept, forget = decay_products(torch.ones_like(theta) if alpha is None else 1 - alpha, same)
    if eta is None:
        past, write = kept.unsqueeze(-1), forget * theta.unsqueeze(-2)
        keep, add = past[..., -1:, :], write[..., -1, :].unsqueeze(-1)
    else:
        fade, span = decay_products(eta, same)
        surprise = span * theta.unsqueeze(-2)  # what of each gradient is in S_t
        past = torch.stack([kept, (forget @ fade.unsqueeze(-1)).squeeze(-1)], -1)
        write = forget @ surprise
        faded = torch.stack([torch.zeros_like(fade[..., -1]), fade[..., -1]], -1).unsqueeze(-2)
        keep = torch.cat([past[..., -1:, :], faded], -2)
        add = torch.stack([write[..., -1, :], surprise[..., -1, :]], -1)
    if document is not None:
        old = (document == 0).to(theta.dtype).unsqueeze(-1)
        past = torch.cat([past * old, past * (1 - old)], -1)
        keep = torch.cat([keep * old[..., -1:, :], keep * (1 - old[..., -1:, :])], -1)
    return ChunkGates(past, write, keep, add, kept)


def read_before(gates: ChunkGates, document: Tensor | None = None) -> ChunkGates:
    """The same chunk read one token earlier: row t holds what token t - 1 left, row 0 the chunk's start, W_c.

    A token that begins a document holds the document's start.
    """
    assert gates.write is not None
    past = torch.cat([torch.zeros_like(gates.past[..., :1, :]), gates.past[..., :-1, :]], -2)
    write = torch.cat([torch.zeros_like(gates.write[..., :1, :]), gates.write[..., :-1, :]], -2)
    begins = torch.zeros_like(gates.kept)
    begins[..., 0] = 1
    slot = torch.zeros_like(past)
    if document is None:
        slot[..., 0] = begins
    else:
        new = torch.cat([document[..., :1] > 0, document.diff(dim=-1) > 0], -1).to(past.dtype)
        begins = torch.maximum(begins, new)
        slot[..., 0], slot[..., past.shape[-1] // 2] = begins * (1 - new), new
    rest = (1 - begins).unsqueeze(-1)
    return ChunkGates(past * rest + slot, write * rest, gates.keep, gates.add, gates.kept)
