"""Causal attention, full or over a window, with rotary positions, a persistent prefix and a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans_dist.config import ModelConfig
from titans_dist.layers.parameter import linear
from titans_dist.layers.rotary import positions, rotary

Prefix = tuple[Tensor, Tensor]
"""Keys and values (1, P, H, D) that every query sees."""


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix: Prefix | None = None, document: Tensor | None = None
) -> Tensor:
    """Attention of each token to itself and all tokens before it, and to the whole prefix.

    Keys and values may have fewer heads than queries, H_kv: each is that of H / H_kv of theirs, one after the other.
    q: (B, T, H, D); k, v: (B, L, H_kv, D), of which the last T are the queries' own tokens; document: (B, L), the
    tokens that see each other have the same number. Returns (B, T, H, D).
    """
    before = k.shape[1] - q.shape[1]
    if before or document is not None:
        return masked_attention(q, k, v, _visible(q, before, None, document), prefix)
    # Queries that nobody asks stand before the prefix's keys: then plain causal attention needs no mask.
    extra = 0
    if prefix is not None:
        extra = prefix[0].shape[1]
        k, v = (torch.cat([p.expand(q.shape[0], -1, -1, -1), x], 1) for p, x in zip(prefix, (k, v), strict=True))
        q = F.pad(q, (0, 0, 0, 0, extra, 0))
    return _attention(q, k, v, is_causal=True)[:, extra:]


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, prefix: Prefix | None = None, document: Tensor | None = None
) -> Tensor:
    """As `causal_attention`, but each token sees only the last `window` tokens, itself included, and the prefix.

    A long sequence is cut into blocks of `window` tokens that look at themselves and one block back: time and memory
    O(T window).
    """
    batch, length = q.shape[:2]
    before = k.shape[1] - length
    if k.shape[1] <= window:
        return causal_attention(q, k, v, prefix, document)
    if length <= window:
        return masked_attention(q, k, v, _visible(q, before, window, document), prefix)
    blocks = -(-length // window)
    kept = min(before, window)
    front, back = window - kept, blocks * window - length

    def cut(x: Tensor, front: int) -> Tensor:  # (B, N, window, H, D)
        return F.pad(x, (0, 0, 0, 0, front, back)).unflatten(1, (-1, window))

    def with_previous(x: Tensor) -> Tensor:  # (B, N, 2 window, H, D)
        x = cut(x[:, before - kept :], front)
        return torch.cat([x[:, :-1], x[:, 1:]], 2)

    row = torch.arange(window, device=q.device)[:, None]
    column = torch.arange(2 * window, device=q.device)[None]
    visible = ((column > row) & (column <= row + window)).repeat(blocks, 1, 1)
    visible[0, :, :front] = False  # there is nothing before the first token
    if document is not None:
        ids = F.pad(document[:, before - kept :], (front, back), value=-1).unflatten(1, (-1, window))
        visible = visible & (ids[:, 1:, :, None] == torch.cat([ids[:, :-1], ids[:, 1:]], 2)[:, :, None])
        visible = visible.flatten(0, 1)
    else:
        visible = visible.repeat(batch, 1, 1)
    y = masked_attention(
        cut(q, 0).flatten(0, 1), with_previous(k).flatten(0, 1), with_previous(v).flatten(0, 1), visible, prefix
    )
    return y.unflatten(0, (batch, blocks)).flatten(1, 2)[:, :length]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, prefix: Prefix | None) -> Tensor:
    """Attention of q (B, T, H, D) to the keys (B, L, H, D) that are `visible` (B or 1, T, L), and to the prefix."""
    if prefix is not None:
        k, v = (torch.cat([p.expand(q.shape[0], -1, -1, -1), x], 1) for p, x in zip(prefix, (k, v), strict=True))
        visible = F.pad(visible, (prefix[0].shape[1], 0), value=True)
    return _attention(q, k, v, attn_mask=visible.unsqueeze(1))


def _attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **options, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def _visible(q: Tensor, before: int, window: int | None, document: Tensor | None) -> Tensor:
    """(B or 1, T, L): which of L = before + T keys the last T tokens see."""
    end = before + q.shape[1]
    query = torch.arange(before, end, device=q.device)[:, None]
    key = torch.arange(end, device=q.device)[None]
    visible = key <= query
    if window is not None:
        visible = visible & (query - key < window)
    visible = visible.unsqueeze(0)
    return visible if document is None else visible & (document[:, before:, None] == document[:, None])


@dataclass
class KeyValueCache:
    """The keys (rotated) and values (B, L, H, D) that tokens to come may see; of a window always L = window - 1.

    running (B, L): those of the document that is still running; the rest is not seen. position (B,): its tokens so far.
    """

    k: Tensor
    v: Tensor
    running: Tensor
    position: Tensor


class GrowingCache(KeyValueCache):
    """The cache of full attention, as long as the sequence so far."""


class Attention(nn.Module):
    """Multi-head attention, (B, T, hidden) -> (B, T, H, D), before any output projection; `window` None is full.

    self_logit: the logit that a token has for itself before training, for inputs of unit size; unset, it is about 0, as
    for any other token.
    """

    plan: ClassVar = {"q": "column", "k": "column", "v": "column"}

    def __init__(self, config: ModelConfig, window: int | None, self_logit: float | None = None) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.head_dim, self.window, self.theta = config.head_dim, window, config.rope_theta
        std, twin = config.init_std, None
        if self_logit is not None:  # equal queries and keys: |q|^2 / sqrt(D) = hidden std^2 sqrt(D)
            std, twin = (self_logit / (hidden * config.head_dim**0.5)) ** 0.5, "q.weight"
        self.q = linear(hidden, hidden, std)
        self.k = linear(hidden, config.kv_heads * config.head_dim, std, twin=twin)
        self.v = linear(hidden, config.kv_heads * config.head_dim, config.init_std)

    def forward(
        self,
        x: Tensor,
        persistent: Tensor | None,
        cache: KeyValueCache | None = None,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, KeyValueCache | None]:
        """`persistent` (1, P, hidden) is seen by every token; it stands at each document's first position.

        With a cache, also returns the one after. starts (B, T): tokens that begin a document.
        """
        before = torch.zeros(1, dtype=torch.int64, device=x.device) if cache is None else cache.position
        position = positions(x.shape[1], before, starts)
        q, (k, v) = self.queries(x, position), self.keys_values(x, position)
        document = None if starts is None else starts.cumsum(1)
        if cache is not None:
            k, v = torch.cat([cache.k, k], 1), torch.cat([cache.v, v], 1)
            own = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device) if document is None else document
            document = torch.cat([cache.running.to(own.dtype) - 1, own], 1)
        prefix = self.prefix(persistent)
        if self.window is None:
            y = causal_attention(q, k, v, prefix, document)
        else:
            y = window_attention(q, k, v, self.window, prefix, document)
        if cache is None:
            return y, None
        assert document is not None
        first = 0 if self.window is None else k.shape[1] - self.window + 1
        running = document == document[:, -1:]
        return y, type(cache)(k[:, first:], v[:, first:], running[:, first:], position[:, -1] + 1)

    def initial_cache(self, batch: int) -> KeyValueCache:
        """The cache before the first token."""
        length = 0 if self.window is None else self.window - 1
        heads = self.k.weight.shape[0] // self.head_dim
        k = self.k.weight.new_zeros(batch, length, heads, self.head_dim)
        running = torch.zeros(batch, length, dtype=torch.bool, device=k.device)
        return (GrowingCache if self.window is None else KeyValueCache)(
            k, k, running, torch.zeros(batch, dtype=torch.int64, device=k.device)
        )

    def queries(self, x: Tensor, position: Tensor) -> Tensor:
        """(B, T, H, D), rotated for the `position` (B or 1, T) of each token."""
        return rotary(self._heads(self.q(x)), self.theta, position)

    def keys_values(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, rotated for the `position` (B or 1, T) of each token, and values, both (B, T, H, D)."""
        return rotary(self._heads(self.k(x)), self.theta, position), self._heads(self.v(x))

    def prefix(self, persistent: Tensor | None) -> Prefix | None:
        """Keys and values of the persistent tokens."""
        if persistent is None:
            return None
        return self._heads(self.k(persistent)), self._heads(self.v(persistent))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))
