"""`heads`: every process works on whole sequences of its share of the heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from titans_dist.memory import MemoryState
from titans_dist.parallel.context.exchange import to_heads, to_tokens
from titans_dist.parallel.context.group import Context

GATES = ("alpha", "eta", "theta", "delta")


class HeadsMemory:
    """`neural_memory` on shares of sequences: what each token gives the memory goes one way, its output the other."""

    def __init__(self, operator: Callable[..., tuple[Tensor, MemoryState]], context: Context) -> None:
        self.operator, self.context = operator, context

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, MemoryState]:
        """See `neural_memory`. The state returned is that of this process's heads, after the whole sequence."""
        starts = options["starts"]
        tokens = {"q": q, "k": k, "v": v, **{gate: options[gate] for gate in GATES}}
        if starts is not None:
            tokens["starts"] = starts.unsqueeze(-1).expand(q.shape[:3]).to(options["theta"].dtype)
        own = self._to_heads({name: x for name, x in tokens.items() if x is not None})
        if starts is not None:
            options["starts"] = own.pop("starts")[:, :, 0] > 0.5
        for name in ("state", "start"):
            if options[name] is not None:
                options[name] = options[name].map(lambda x: self._share(x, 1))
        norm = options["norm"]
        options["norm"] = None if norm is None else tuple(self._share(x, 0) for x in norm)
        options["weights"] = [self._share(w, 0) for w in options["weights"]]
        y, state = self.operator(**(options | own))
        return to_tokens(y, self.context), state

    def _to_heads(self, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        """All in one message; in two where gates are more precise than q, k and v."""
        own: dict[str, Tensor] = {}
        for dtype in dict.fromkeys(x.dtype for x in tokens.values()):
            names = [name for name, x in tokens.items() if x.dtype == dtype]
            flat = [tokens[name].flatten(3) if tokens[name].dim() > 3 else tokens[name].unsqueeze(3) for name in names]
            parts = to_heads(torch.cat(flat, 3), self.context).split([x.shape[3] for x in flat], 3)
            for name, part in zip(names, parts, strict=True):
                own[name] = part if tokens[name].dim() > 3 else part.squeeze(3)
        return own

    def _share(self, x: Tensor, axis: int) -> Tensor:
        return x.chunk(self.context.size, axis)[self.context.rank]
