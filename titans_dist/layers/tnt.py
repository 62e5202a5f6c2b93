"""TNT: one global memory in large chunks, and local memories that begin anew every shard.

    y_t = f_V(q_t) + f_{W_t}(M_t q_t)

V is the global memory as it was before the running global chunk. W_t is the local memory, which starts from its learned
weights at every shard, and M_t = sum k k^T / ||k||^2 over the shard so far brings the query to where the shard's keys
are. No shard needs the one before it: where whole shards are at hand they are worked on side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from titans_dist.config import ModelConfig
from titans_dist.layers.inner_memory import InnerMemory
from titans_dist.memory import MemorySpec, MemoryState, neural_memory
from titans_dist.memory.grad_clip import StateGradClip

_KEYS = MemorySpec.preset("linear_attention")


@dataclass
class LocalState:
    """The running shard: its memory, its sum of k k^T, and how many of its tokens are written."""

    memory: MemoryState
    keys: MemoryState
    position: int


@dataclass
class TNTState:
    """A global memory beside a local one."""

    everything: MemoryState
    shard: LocalState


class TNTMemory(nn.Module):
    """In the place of an InnerMemory, see there. The shards follow the row, as chunks do, not its documents."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        memory = config.memory
        assert memory.global_chunk_size is not None
        self.shard_size = memory.shard_size
        self.everything = InnerMemory(config, memory.global_chunk_size, "start")
        self.shard = InnerMemory(config, memory.chunk_size, memory.read)

    def forward(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: TNTState,
        start: TNTState | None = None,
        starts: Tensor | None = None,
        clip: StateGradClip | None = None,
    ) -> tuple[Tensor, TNTState]:
        """See InnerMemory."""
        assert clip is None, "each of the two memories has its own"
        begin = None if start is None else start.everything
        y, everything = self.everything(x, q, k, v, state.everything, begin, starts)
        found, shard = [], state.shard
        for first, last in self._pieces(shard.position, x.shape[1]):
            part = [None if a is None else a[:, first:last] for a in (x, q, k, v, starts)]
            local, shard = self._in_shard(shard, *part)  # type: ignore[arg-type]
            found.append(local)
        return y + torch.cat(found, 1), TNTState(everything, shard)

    def read_persistent(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, TNTState]:
        """The global memory reads them; the local ones know their shard alone."""
        y, everything = self.everything.read_persistent(x, q, k, v)
        return y, TNTState(everything, self._new_shard(1))

    def learned_state(self, batch: int) -> TNTState:
        """The memory before it has read anything."""
        return TNTState(self.everything.learned_state(batch), self._new_shard(batch))

    def _new_shard(self, batch: int) -> LocalState:
        memory = self.shard.learned_state(batch)
        heads, dim = memory.weights[0].shape[1:3]
        return LocalState(memory, MemoryState([memory.weights[0].new_zeros(batch, heads, dim, dim)]), 0)

    def _pieces(self, position: int, length: int) -> Iterator[tuple[int, int]]:
        """(first, last) token of the running shard's rest, of all whole shards together, and of what is left."""
        first = min(length, self.shard_size - position) if position else 0
        whole = first + (length - first) // self.shard_size * self.shard_size
        for a, b in ((0, first), (first, whole), (whole, length)):
            if b > a:
                yield a, b

    def _in_shard(
        self, state: LocalState, x: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None
    ) -> tuple[Tensor, LocalState]:
        """Tokens of one shard, or of any number of whole ones."""
        batch, length = x.shape[:2]
        shards = max(1, length // self.shard_size)
        if shards > 1 or state.position == 0:
            state = self._new_shard(batch * shards)
        x, q, k, v = (a.unflatten(1, (shards, -1)).flatten(0, 1) for a in (x, q, k, v))
        starts = None if starts is None else starts.unflatten(1, (shards, -1)).flatten(0, 1)
        start = None if starts is None else self._new_shard(batch * shards)
        half = torch.full(k.shape[:3], 0.5, dtype=state.keys.weights[0].dtype, device=k.device)
        at, keys = neural_memory(
            q,
            k,
            k,
            spec=_KEYS,
            weights=[state.keys.weights[0][0]],
            theta=half,
            state=state.keys,
            start=None if start is None else start.keys,
            starts=starts,
            chunk_size=self.shard.chunk_size,
            recompute=self.shard.recompute,
        )
        y, memory = self.shard(x, at, k, v, state.memory, None if start is None else start.memory, starts)
        y = y.unflatten(0, (batch, shards)).flatten(1, 2)
        position = (state.position + length) % self.shard_size
        if position == 0:
            return y, self._new_shard(batch)
        return y, LocalState(memory, keys, position)
