"""The gates of a chunk in closed form: what reaches token t, and the chunk's end, of every write and of the past.

The memory's past is W_c and, with momentum, S_c: m = 1 or 2 slots, which the gates mix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class ChunkGates:
    """Coefficients of all N chunks of b tokens. With the inner gradients u_i and the slots X = (W, S) or (W,):

        W_t = sum_m past_tm X_m - sum_i write_ti u_i          token t's memory
        X'_m = sum_n keep_mn X_n - sum_i add_mi u_i            the slots at the chunk's end

    past (B, H, N, b, m); write (B, H, N, b, b), lower triangular: this is the causal mask; keep (B, H, N, m, m);
    add (B, H, N, m, b).
    """

    past: Tensor
    write: Tensor
    keep: Tensor
    add: Tensor

    def split(self) -> list[ChunkGates]:
        """The gates of each chunk alone, batch and heads in one dimension.

        All chunks are unbound at once. Taking them one by one would make each one's gradient as large as all.
        """
        chunks = zip(*(x.flatten(0, 1).unbind(1) for x in vars(self).values()), strict=True)
        return [ChunkGates(*chunk) for chunk in chunks]


def decay_products(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Products of factors (..., b) within a chunk: from its start, (..., b), and between tokens, (..., b, b).

    Entry (t, s) of the second is prod_{s < j <= t} factor_j for s <= t (1 on the diagonal) and 0 above it. Sums of
    logarithms over each span, never a quotient of products or a difference of sums: those underflow or cancel.
    """
    b = factor.shape[-1]
    log = factor.clamp_min(torch.finfo(factor.dtype).tiny).log()
    lower = torch.ones(b, b, dtype=factor.dtype, device=factor.device).tril()
    spans = lower @ (log.unsqueeze(-1) * lower.tril(-1))  # sums over j <= t of the logarithms with j > s
    return (log @ lower.mT).exp(), spans.exp() * lower


def chunk_gates(alpha: Tensor, eta: Tensor | None, theta: Tensor) -> ChunkGates:
    """Gates (B, H, N, b) -> ChunkGates. `alpha` is the share forgotten; `eta` None means no momentum."""
    kept, forget = decay_products(1 - alpha)
    if eta is None:
        past, write = kept.unsqueeze(-1), forget * theta.unsqueeze(-2)
        return ChunkGates(past, write, past[..., -1:, :], write[..., -1:, :])
    fade, span = decay_products(eta)
    surprise = span * theta.unsqueeze(-2)  # what of each gradient is in S_t
    past = torch.stack([kept, (forget @ fade.unsqueeze(-1)).squeeze(-1)], -1)
    write = forget @ surprise
    faded = torch.stack([torch.zeros_like(fade[..., -1]), fade[..., -1]], -1).unsqueeze(-2)
    return ChunkGates(
        past,
        write,
        torch.cat([past[..., -1:, :], faded], -2),
        torch.cat([write[..., -1:, :], surprise[..., -1:, :]], -2),
    )


def read_before(gates: ChunkGates) -> ChunkGates:
    """The same chunk read one token earlier: row t holds what token t - 1 left (row 0: the chunk's start, W_c)."""
    start = torch.zeros_like(gates.past[..., :1, :])
    start[..., 0] = 1
    past = torch.cat([start, gates.past[..., :-1, :]], -2)
    write = torch.cat([torch.zeros_like(gates.write[..., :1, :]), gates.write[..., :-1, :]], -2)
    return ChunkGates(past, write, gates.keep, gates.add)
