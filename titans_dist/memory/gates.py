"""The gates of a chunk in closed form: what reaches token t of every write, of W and of S at the chunk's start."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class ChunkGates:
    """Coefficients of all N chunks at once, for chunks of b tokens.

    With the gradients u: `W_t = keep_t W_c + carry_t S_c - sum_i write_ti u_i`, and the surprise
    `S_t = fade_t S_c - sum_i surprise_ti u_i`.
    keep, carry, fade (B, H, N, b, 1); write, surprise (B, H, N, b, b), lower triangular: this is the causal mask.
    Without momentum carry, fade and surprise are None.
    """

    keep: Tensor
    write: Tensor
    carry: Tensor | None = None
    fade: Tensor | None = None
    surprise: Tensor | None = None

    def split(self, lengths: list[int]) -> list[ChunkGates]:
        """The gates of each chunk alone, (B H, tokens, ..), cut to its length: exact, because the gates are causal.

        All chunks are unbound at once. Taking them one by one would make each one's gradient as large as all.
        """
        parts = [[None] * len(lengths) if x is None else x.flatten(0, 1).unbind(1) for x in vars(self).values()]
        return [ChunkGates(*(_cut(x, c) for x in chunk)) for *chunk, c in zip(*parts, lengths, strict=True)]


def _cut(x: Tensor | None, length: int) -> Tensor | None:
    """The first `length` tokens of gates (B H, b, 1) or (B H, b, b)."""
    return x if x is None or x.shape[1] == length else x[:, :length, :length]


def decay_products(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Products of factors (..., b) within a chunk: from its start, (..., b), and between tokens, (..., b, b).

    Entry (t, s) of the second is prod_{s < j <= t} factor_j for s <= t (1 on the diagonal) and 0 above it. Sums of
    logarithms over each span, never a quotient of products: those underflow.
    """
    b = factor.shape[-1]
    log = factor.clamp_min(torch.finfo(factor.dtype).tiny).log()
    lower = torch.ones(b, b, dtype=factor.dtype, device=factor.device).tril()
    spans = lower @ (log.unsqueeze(-1) * lower.tril(-1))  # sums over j <= t of the logarithms with j > s
    return (log @ lower.mT).exp(), spans.exp() * lower


def chunk_gates(alpha: Tensor, eta: Tensor | None, theta: Tensor) -> ChunkGates:
    """Gates (B, H, N, b) -> ChunkGates. `alpha` is the share forgotten; `eta` None means no momentum."""
    keep, forget = decay_products(1 - alpha)
    if eta is None:
        return ChunkGates(keep.unsqueeze(-1), forget * theta.unsqueeze(-2))
    fade, span = decay_products(eta)
    surprise = span * theta.unsqueeze(-2)
    carry = forget @ fade.unsqueeze(-1)
    return ChunkGates(keep.unsqueeze(-1), forget @ surprise, carry, fade.unsqueeze(-1), surprise)


def read_before(gates: ChunkGates) -> ChunkGates:
    """The same chunk seen one token earlier: row t holds what token t - 1 left (row 0: the chunk's start)."""

    def shift(x: Tensor, first: float) -> Tensor:
        return torch.cat([torch.full_like(x[..., :1, :], first), x[..., :-1, :]], -2)

    carry = None if gates.carry is None else shift(gates.carry, 0.0)
    return ChunkGates(shift(gates.keep, 1.0), shift(gates.write, 0.0), carry)
