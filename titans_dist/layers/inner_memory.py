"""A memory with its learned start and the gates that each token gives it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

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
    full_width: ClassVar = {"weights": "hidden", "gain": "whole", "bias": "whole"}

    def __init__(self, config: ModelConfig, chunk_size: int, read: str) -> None:
        super().__init__()
        heads, dim, memory = config.num_heads, config.head_dim, config.memory
        self.spec = MemorySpec(**memory.spec_fields())
        self.chunk_size, self.read = chunk_size, read
        self.backend = memory.backend
        self.recompute, self.state_grad_clip = True, memory.state_grad_clip
        self.gates = Gates(config, self.spec, chunk_size)
        self.kernel: Callable[..., tuple[Tensor, MemoryState]] = neural_memory
        """What computes the memory: `neural_memory`, or a form of it for some other arrangement of its weights."""
        self.operator: Callable[..., tuple[Tensor, MemoryState]] = self._observed
        """What `forward` calls: the kernel, or something around it for some other arrangement of the tokens."""
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
        return self.operator(
            q,
            k,
            v,
            **self._given(x, k),
            state=state,
            start=start,
            starts=starts,
            chunk_size=self.chunk_size,
            read=self.read,
            state_grad_clip=self.state_grad_clip if clip is None else clip,
        )

    def read_persistent(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, MemoryState]:
        """The tokens before every sequence (1, P, ...), written as one chunk of their own."""
        return self.kernel(
            q,
            k,
            v,
            **self._given(x, k),
            state=self.learned_state(x.shape[0]),
            chunk_size=x.shape[1] if self.spec.has_chunked_form else 1,
            state_grad_clip=self.state_grad_clip,
        )

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

    def _given(self, x: Tensor, k: Tensor) -> dict[str, Any]:
        """The arguments of `neural_memory` that are this memory's, and the gates of the tokens."""
        gates = self.gates(x, k)
        return {
            "spec": self.spec,
            "weights": list(self.weights),
            "alpha": gates.alpha,
            "eta": gates.eta,
            "theta": gates.theta,
            "delta": gates.delta,
            "norm": (self.gain, self.bias) if self.spec.residual else None,
            "recompute": self.recompute,
            # One token, as in decoding, is quicker as what the chunked form is equal to.
            "backend": "recurrent" if k.shape[1] == 1 else self.backend,
        }

    def _observed(self, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, MemoryState]:
        """The kernel, seen by the telemetry."""
        y, after = self.kernel(q, k, v, **given)
        observe(
            self,
            k=k,
            v=v,
            **{name: given[name] for name in ("spec", "alpha", "eta", "theta", "delta", "norm", "chunk_size")},
            start_state=given["state"],
            end_state=after,
            theta_max=None if self.gates.theta is None else self.gates.theta_max,
        )
        return y, after
