"""Multi-query associative recall that attention over a window cannot reach.

    key value key value ...   noise noise noise ...   key key key ...
    \\_______ pairs ______/    \\_____ the gap _____/    \\_ queries _/

Pairs are new in every sequence, so nothing can be learned by heart. At each query the model is to name the value that
stood beside that key; no value appears after the pairs, so there is nothing nearer to copy. From every pair to every
query it is farther than what all layers' windows, segments and convolutions reach together: only a memory, or full
attention, can carry it. Values are drawn with replacement: who knows nothing is right 1 / values of the time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from titans_dist.config import ModelConfig
from titans_dist.config.sizes import parameter_count

LAYERS, HIDDEN, HEADS = 2, 64, 2
WINDOW = 8  # of the sliding-window attention, and MAC's segment
CONV_KERNEL = 4
CHUNK = 8
PARAMETERS = 160_000


@dataclass(frozen=True)
class Task:
    """Sizes of the task. Token ids: keys first, then values, then noise."""

    pairs: int = 8
    keys: int = 16
    values: int = 16
    noise: int = 16
    gap: int = 32
    rounds: int = 2
    """How often each pair is asked for."""

    @property
    def vocab_size(self) -> int:
        """Different tokens."""
        return self.keys + self.values + self.noise

    @property
    def queries(self) -> int:
        """Queries of a sequence: its last tokens."""
        return self.rounds * self.pairs

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return 2 * self.pairs + self.gap + self.queries

    @property
    def chance(self) -> float:
        """Accuracy of a model that knows nothing of the pairs."""
        return 1 / self.values

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens (B, T) and, for the queries at their end, the values (B, Q)."""
        keys = torch.rand(size, self.keys, generator=generator).argsort(1)[:, : self.pairs]
        values = self.keys + torch.randint(self.values, (size, self.pairs), generator=generator)
        noise = self.keys + self.values + torch.randint(self.noise, (size, self.gap), generator=generator)
        asked = torch.rand(size, self.rounds, self.pairs, generator=generator).argsort(2).flatten(1)
        pairs = torch.stack([keys, values], 2).flatten(1)
        return torch.cat([pairs, noise, keys.gather(1, asked)], 1), values.gather(1, asked)


def reach() -> int:
    """Tokens back that a model without memory could see at most.

    In each layer the attention's window or segment, and a convolution before and one after it (MAC has both).
    """
    return LAYERS * (WINDOW - 1 + 2 * (CONV_KERNEL - 1))


# A pair is shown once and must be written at once: theta may grow beyond the default, which is safe for chunks of equal
# keys too.
_TITANS = {
    "persistent_tokens": 4,
    "memory": {"preset": "titans", "expansion": 2, "chunk_size": CHUNK, "theta_max": 1.6 / CHUNK},
}
MODELS: dict[str, tuple[str, dict]] = {
    "lmm": ("Titans LMM", _TITANS),
    "mac": ("Titans MAC", _TITANS),
    "mag": ("Titans MAG", _TITANS),
    "mal": ("Titans MAL", _TITANS),
    "gated_deltanet": ("Gated DeltaNet", {"persistent_tokens": 0, "memory": {"chunk_size": 16}}),
    "transformer": ("Transformer++, full attention", {"persistent_tokens": 0}),
    "swa": ("SWA only, the control", {"persistent_tokens": 0}),
}
"""Variant: its name in the table, and what it does not share with the others."""


def model_config(variant: str, task: Task) -> ModelConfig:
    """The model of `variant`, with the MLP as wide as its share of the parameters allows."""
    config = ModelConfig(
        variant=variant,
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_heads=HEADS,
        vocab_size=task.vocab_size,
        window=WINDOW,
        segment_length=WINDOW,
        conv_kernel=CONV_KERNEL,
        init_std=0.05,  # the default is meant for wide models
        tie_embeddings=False,  # else attention takes longer to see which token was beside which
        rope_theta=100.0,  # sequences are short
        intermediate_size=1,
        **MODELS[variant][1],
    )
    smallest = parameter_count(config)
    per_width = parameter_count(replace(config, intermediate_size=2)) - smallest
    return replace(config, intermediate_size=1 + round((PARAMETERS - smallest) / per_width))
