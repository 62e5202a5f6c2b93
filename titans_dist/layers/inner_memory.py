"""A memory with its learned start and the gates that each token gives it."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from titans_dist.config import ModelConfig
from titans_dist.layers.gates import Gates, is_linear_recurrence
from titans_dist.layers.parameter import constant, normal, parameter
from titans_dist.layers.telemetry import observe
from titans_dist.memory import MemorySpec, MemoryState, initial_state, neural_memory
from titans_dist.memory.grad_clip import StateGradClip
from titans_dist.memory.network import apply
from titans_dist.memory.retention import link


class InnerMemory(nn.Module):
    """Writes keys and values (B, T, H, D) into its memory and reads it with queries, both (B, T, H, D)."""

    plan: ClassVar = {"weights": "heads", "gain": "heads", "bias": "heads"}

    def __init__(self, config: ModelConfig, chunk_size: int, read: str) -> None:
        super().__init__()
        heads, dim, memory = config.num_heads, config.head_dim, config.memory
        self.spec = MemorySpec(**memory.spec_fields())
        self.chunk_size, self.read = chunk_size, read
        self.backend = memory.backend
        self.recompute, self.state_grad_clip = memory.recompute, memory.state_grad_clip
        self.gates = Gates(config, self.spec, chunk_size)
        # What is linear in its state starts from nothing, as its papers have it; a network must start as one.
        stds = [0.0] if is_linear_recurrence(self.spec) else self.spec.initial_std(dim)
        self.weights = nn.ParameterList(
            parameter(heads, d_in, d_out, init=normal(std), decay=True)
            for (d_in, d_out), std in zip(self.spec.shapes(dim), stds, strict=True)
        )
        if self.spec.residual:
            self.gain = parameter(heads, dim, init=constant(1.0))
            self.bias = parameter(heads, dim, init=constant(0.0))

    def forward(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: MemoryState,
        start: MemoryState | None = None,
        starts: Tensor | None = None,
        clip: StateGradClip | None = None,
    ) -> tuple[Tensor, MemoryState]:
        """x (B, T, hidden) decides the gates. Documents that begin at `starts` (B, T) begin with `start`.

        clip: the one that several calls on one sequence share, in the place of `state_grad_clip`'s.
        """
        limit = self.state_grad_clip if clip is None else clip
        return self._write(x, q, k, v, state, start, starts, self.chunk_size, self.read, limit, observed=True)

    def read_persistent(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, MemoryState]:
        """The tokens before every sequence (1, P, ...), written as one chunk of their own."""
        chunk_size = x.shape[1] if self.spec.has_chunked_form else 1
        state = self.learned_state(x.shape[0])
        limit = self.state_grad_clip
        return self._write(x, q, k, v, state, None, None, chunk_size, "after", limit, observed=False)

    def learned_state(self, batch: int) -> MemoryState:
        """The memory before it has read anything."""
        return initial_state(self.spec, list(self.weights), batch)

    def retrieve(self, q: Tensor, weights: list[Tensor]) -> Tensor:
        """f_W(q) for q (B, T, H, D) with what a state between two chunks holds: `weights` (B or 1, H, d_in, d_out)."""
        queries = q.transpose(1, 2).to(weights[0].dtype)
        norm = None
        if self.spec.residual:
            norm = (self.gain.unsqueeze(1).to(queries.dtype), self.bias.unsqueeze(1).to(queries.dtype))
        y = apply(self.spec, [link(self.spec, w)[0] for w in weights], queries, norm)
        return y.transpose(1, 2).to(q.dtype)

    def _write(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: MemoryState,
        start: MemoryState | None,
        starts: Tensor | None,
        chunk_size: int,
        read: str,
        state_grad_clip: float | StateGradClip | None,
        observed: bool,
    ) -> tuple[Tensor, MemoryState]:
        gates = self.gates(x, k)
        norm = (self.gain, self.bias) if self.spec.residual else None
        y, after = neural_memory(
            q,
            k,
            v,
            spec=self.spec,
            weights=list(self.weights),
            alpha=gates.alpha,
            eta=gates.eta,
            theta=gates.theta,
            delta=gates.delta,
            norm=norm,
            state=state,
            start=start,
            starts=starts,
            chunk_size=chunk_size,
            read=read,
            recompute=self.recompute,
            # One token, as in decoding, is quicker as what the chunked form is equal to.
            backend="recurrent" if k.shape[1] == 1 else self.backend,
            state_grad_clip=state_grad_clip,
        )
        if observed:
            observe(
                self,
                spec=self.spec,
                k=k,
                v=v,
                alpha=gates.alpha,
                eta=gates.eta,
                theta=gates.theta,
                delta=gates.delta,
                norm=norm,
                start_state=state,
                end_state=after,
                chunk_size=chunk_size,
                theta_max=None if self.gates.theta is None else self.gates.theta_max,
            )
        return y, after
