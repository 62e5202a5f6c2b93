"""The memory token by token: the definition that every faster form must equal.

For token t in the chunk that starts at the memory W_c (Titans, eqs 12-18):

    u_t = dl/dW (W_c; k_t, v_t)
    S_t = eta_t S_{t-1} - theta_t u_t
    W_t = (1 - alpha_t) W_{t-1} + S_t
    y_t = f(W_t; q_t)   (read="after")   or   f(W_{t-1}; q_t)   (read="before")
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_dist.memory.activations import ACTIVATIONS
from titans_dist.memory.network import Norm, descent, output
from titans_dist.memory.spec import MemorySpec, MemoryState


def recurrence(
    spec: MemorySpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor | None,
    theta: Tensor,
    norm: Norm | None,
    state: MemoryState,
    chunk_size: int,
    read: str,
) -> tuple[Tensor, MemoryState]:
    """q, k, v (B, H, T, D), gates (B, H, T) -> y (B, H, T, D) and the state after token T; one W per token."""
    activation, _ = ACTIVATIONS[spec.activation]
    weights, momentum = state.weights, state.momentum
    anchor, outputs = weights, []
    for t in range(q.shape[2]):
        if t % chunk_size == 0:
            anchor = weights
        before = weights
        inputs, deltas = descent(spec, anchor, k[:, :, t : t + 1], v[:, :, t : t + 1], norm)
        steps = [theta[:, :, t, None, None] * (a.mT @ d) for a, d in zip(inputs, deltas, strict=True)]
        keep = 1 - alpha[:, :, t, None, None]
        if eta is not None:
            momentum = [eta[:, :, t, None, None] * s + step for s, step in zip(momentum, steps, strict=True)]
            weights = [keep * w + s for w, s in zip(weights, momentum, strict=True)]
        else:
            weights = [keep * w + step for w, step in zip(weights, steps, strict=True)]
        x = query = q[:, :, t : t + 1]
        seen = weights if read == "after" else before
        for i, w in enumerate(seen):
            x = x @ w
            if i + 1 < len(seen):
                x = activation(x)
        outputs.append(output(spec, query, x, norm))
    return torch.cat(outputs, 2), MemoryState(weights, momentum)
