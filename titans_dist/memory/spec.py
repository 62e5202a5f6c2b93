"""What a memory is, apart from its numbers: MIRAS's four choices (structure, bias, retention, algorithm)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from titans_dist.config.presets import PRESETS

ACTIVATIONS = ("gelu", "silu", "relu", "identity")
BIASES = ("l2", "dot", "l1", "lp", "huber")
RETENTIONS = ("none", "l2", "lq", "lq_paper", "kl", "elastic_net")


@dataclass(frozen=True)
class MemorySpec:
    """An MLP memory without biases, trained at test time. Raises ValueError for choices that do not go together.

    Structure: `depth` layers, hidden layers `expansion` times as wide as a head, `activation` between them; with
    `residual` f(x) = x + LayerNorm(MLP(x)).
    Attentional bias: what the inner loss is, see `titans_dist.memory.bias`.
    Retention: how the past is kept, see `titans_dist.memory.retention`.
    Algorithm: gradient descent, with `momentum` the past surprise is carried on (Titans, eqs 9-10).
    Gradients are taken where the chunk began (`anchor="chunk"`) or at each token's own memory ("token"), there before
    or after the token's forgetting (`decay`); `implicit` is Longhorn's closed-form step.
    `channel_wise` gates forget, keep and learn per channel of the head instead of per head.
    """

    depth: int = 2
    expansion: int = 4
    activation: str = "gelu"
    residual: bool = True
    bias: str = "l2"
    retention: str = "l2"
    momentum: bool = True
    anchor: str = "chunk"
    decay: str = "after"
    implicit: bool = False
    channel_wise: bool = False
    p: float = 3.0
    """Power of bias="lp", >= 1."""
    q: float = 4.0
    """Norm of retention="lq" and "lq_paper", >= 2."""
    sharpness: float = 10.0
    """a of the smooth sign tanh(a x) in bias="l1" and "lp", > 0."""
    threshold: float = 1e-4
    """What retention="elastic_net" takes from every weight per token, >= 0."""

    def __post_init__(self) -> None:
        _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("bias", self.bias, BIASES)
        _one_of("retention", self.retention, RETENTIONS)
        _one_of("anchor", self.anchor, ("chunk", "token"))
        _one_of("decay", self.decay, ("after", "before"))
        _at_least("depth", self.depth, 1)
        _at_least("expansion", self.expansion, 1)
        _at_least("p", self.p, 1)
        _at_least("q", self.q, 2)
        _at_least("threshold", self.threshold, 0)
        if not self.sharpness > 0:
            raise ValueError(f"sharpness={self.sharpness} must be above 0")
        if self.anchor == "token" and not self.is_linear:
            raise ValueError(f"anchor='token' needs retention 'none' or 'l2', not {self.retention!r}")
        if self.decay == "before" and self.anchor != "token":
            raise ValueError("decay='before' needs anchor='token': a chunk's gradients are taken before its forgetting")
        if self.implicit and not (self.depth == 1 and self.bias == "l2" and self.anchor == "token"):
            raise ValueError("implicit=True needs depth=1, bias='l2' and anchor='token'")
        if self.implicit and (self.residual or self.momentum):
            raise ValueError("implicit=True needs residual=False and momentum=False")
        if self.channel_wise and (self.depth > 2 or not self.is_linear or self.anchor != "chunk"):
            raise ValueError("channel_wise=True needs depth <= 2, retention 'none' or 'l2' and anchor='chunk'")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> MemorySpec:
        """The memory called `name`, with some choices changed.

        Gates have one meaning for all: alpha is the share forgotten; theta is beta/2 for the delta rules and 1/2 for
        the dot losses; eta is ignored without momentum.

        >>> MemorySpec.preset("gated_deltanet").anchor
        'token'
        """
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @property
    def is_linear(self) -> bool:
        """Whether the memory is what was written, kept by factors alone."""
        return self.retention in ("none", "l2")

    @property
    def is_delta_rule(self) -> bool:
        """Whether each token's gradient needs the memory the token before it left."""
        is_free = self.bias == "dot" and self.depth == 1 and not self.residual  # a gradient that asks no memory
        return self.anchor == "token" and not is_free

    @property
    def has_chunked_form(self) -> bool:
        """Whether chunks of more than one token can be worked on in parallel."""
        plain = self.depth == 1 and not self.residual and not self.momentum
        return self.anchor == "chunk" or (plain and self.bias in ("l2", "dot"))

    def shapes(self, head_dim: int) -> list[tuple[int, int]]:
        """(d_in, d_out) of each layer for heads of `head_dim` dimensions."""
        hidden = head_dim * self.expansion
        sizes = [head_dim] + [hidden] * (self.depth - 1) + [head_dim]
        return list(pairwise(sizes))

    def initial_std(self, head_dim: int) -> list[float]:
        """Standard deviation of each layer's initial weights.

        With `residual` the last layer of a deep memory starts large. Under the LayerNorm its scale changes no output,
        but divides its inner gradients: a chunk of equal keys then moves the memory by its error, not by many times it.
        """
        stds = [d_in**-0.5 for d_in, _ in self.shapes(head_dim)]
        if not self.residual:
            return stds
        stds[0] = 1.0  # keys have unit length
        return stds if self.depth == 1 else [*stds[:-1], 5 * stds[-1]]


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(allowed)}")


def _at_least(name: str, value: float, low: float) -> None:
    if not value >= low:
        raise ValueError(f"{name}={value} is too small; use {low} or more")
