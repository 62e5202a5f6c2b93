"""All properties, one after the other."""

from __future__ import annotations

import torch
from torch import nn

from titans_dist.config import ConfigError
from titans_dist.conformance import properties
from titans_dist.conformance.subject import Subject, Target
from titans_dist.conformance.verdict import Verdict


def check(
    target: Target, *, vocab_size: int, length: int = 144, batch: int = 2, probes: int = 32, seed: int = 0
) -> list[Verdict]:
    """One Verdict for each property of `target`.

    target: called as target(tokens) with tokens (B, T) int64 -> outputs (B, T, ...) of floating point numbers, the
    same whenever the tokens are the same; an nn.Module, or any function. If it has `initial_state(batch)`, it is also
    called as target(tokens, state=state) -> (outputs, state).
    vocab_size, length, batch: random tokens 0 .. vocab_size - 1 of shape (batch, length). `length` should be well
    beyond the target's chunks and windows. probes: how many of the tokens are changed in turn to look for leaks.

    A module is checked as a copy in float64 if it can be, in the mode (training or not) that it is in.
    Raises ConfigError where the target does not do what is said here.
    """
    for name, value, low in (
        ("vocab_size", vocab_size, 2),
        ("length", length, 4),
        ("batch", batch, 2),
        ("probes", probes, 1),
    ):
        if value < low:
            raise ConfigError(f"{name}={value} is too small for these checks; use {low} or more")
    tokens = torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed)).to(
        _device(target)
    )
    subject = Subject.in_double(target, tokens)
    with torch.no_grad():
        first, again = subject(tokens), subject(tokens)
    if not torch.equal(first, again):
        raise ConfigError(
            f"the target gives other outputs when it is called again with the same tokens (by "
            f"{float((first - again).abs().max()):.1e}); turn off dropout and keep no state between calls"
        )
    return [
        properties.causality(subject, tokens, vocab_size, probes),
        properties.batch_independence(subject, tokens, vocab_size),
        properties.gradient_flow(subject, tokens),
        properties.split_invariance(subject, tokens),
        properties.recurrence_equality(subject, tokens),
    ]


def _device(target: Target) -> torch.device:
    parameters = target.parameters() if isinstance(target, nn.Module) else iter(())
    return next((p.device for p in parameters), torch.device("cpu"))
