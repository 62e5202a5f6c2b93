"""The properties. Each is a function of the target and of random tokens (B, T), and gives a Verdict."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titans_dist.conformance.subject import Subject
from titans_dist.conformance.verdict import Verdict
from titans_dist.layers.inner_memory import InnerMemory
from titans_dist.model import LanguageModel


@torch.no_grad()
def causality(subject: Subject, tokens: Tensor, vocab_size: int, probes: int) -> Verdict:
    """Changing token j changes no output before j: bit for bit in float64, but for rounding in other types."""
    y = subject(tokens)
    length = tokens.shape[1]
    allowed = 0.0 if y.dtype == torch.float64 else 16 * torch.finfo(y.dtype).eps * float(y.abs().max())
    places = sorted({round(j) for j in torch.linspace(1, length - 1, min(probes, length - 1)).tolist()})
    largest, where = 0.0, (0, 0)
    for j in places:
        changed = tokens.clone()
        changed[:, j] = (changed[:, j] + 1) % vocab_size
        leak = (subject(changed)[:, :j] - y[:, :j]).abs().amax((0, 2))
        if leak.max() > largest:
            largest, where = float(leak.max()), (j, int(leak.argmax()))
    tried = f"{len(places)} of {length} tokens changed in turn, in {str(y.dtype).removeprefix('torch.')}"
    if largest > allowed:
        return Verdict("causality", False, f"token {where[0]} changed output {where[1]} by {largest:.1e}; {tried}")
    return Verdict("causality", True, f"largest change before the changed token {largest:.1e}; {tried}")


@torch.no_grad()
def batch_independence(subject: Subject, tokens: Tensor, vocab_size: int) -> Verdict:
    """A sequence's outputs depend neither on the other sequences' tokens nor on how many there are."""
    name, y = "batch independence", subject(tokens)
    allowed = 0.0 if y.dtype == torch.float64 else 16 * torch.finfo(y.dtype).eps * float(y.abs().max())
    largest = alone = 0.0
    for i in range(tokens.shape[0]):
        others = (tokens + 1) % vocab_size
        others[i] = tokens[i]
        change = (subject(others)[i] - y[i]).abs().amax(-1)
        if change.max() > allowed:
            evidence = f"other tokens in the other sequences changed output {int(change.argmax())} of sequence {i}"
            return Verdict(name, False, f"{evidence} by {float(change.max()):.1e}")
        largest = max(largest, float(change.max()))
        change = (subject(tokens[i : i + 1])[0] - y[i]).abs().amax(-1)
        if change.max() > rounding(y):
            evidence = f"sequence {i} alone has another output {int(change.argmax())} than in a batch of {len(tokens)}"
            return Verdict(name, False, f"{evidence}, by {float(change.max()):.1e}")
        alone = max(alone, float(change.max()))
    return Verdict(name, True, f"largest change with other sequences {largest:.1e}, without them {alone:.1e}")


def gradient_flow(subject: Subject, tokens: Tensor) -> Verdict:
    """A loss of all outputs has a gradient, finite and not zero, at every parameter.

    Parameters that are zero everywhere, as many layers start, hide others: they are something else meanwhile.
    """
    name, module = "gradient flow", subject.target
    if not isinstance(module, nn.Module):
        return Verdict(name, None, "the target is no nn.Module, so its parameters are not known")
    wanted = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not wanted:
        return Verdict(name, None, "the target has no parameters that learn")
    generator = torch.Generator().manual_seed(1)
    zeros = [p for p in wanted.values() if not p.detach().any()]
    with torch.no_grad():
        for p in zeros:
            p.copy_(0.01 * torch.randn(p.shape, generator=generator))
    try:
        y = subject(tokens)
        if not y.requires_grad:
            return Verdict(name, False, f"the outputs have no gradient at all; {len(wanted)} parameters wait for one")
        loss = (y * torch.randn(y.shape, generator=generator).to(y)).sum()
        grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    finally:
        with torch.no_grad():
            for p in zeros:
                p.zero_()
    dead = [name for name, g in zip(wanted, grads, strict=True) if g is None or not g.abs().max() > 0]
    wild = [name for name, g in zip(wanted, grads, strict=True) if g is not None and not g.isfinite().all()]
    if wild:
        return Verdict(name, False, f"gradient not finite: {_listed(wild)}")
    if dead:
        return Verdict(name, False, f"no gradient: {_listed(dead)}")
    least = min(float(g.abs().max()) for g in grads if g is not None)
    return Verdict(name, True, f"all {len(wanted)} parameters have one; the least is {least:.1e}")


@torch.no_grad()
def split_invariance(subject: Subject, tokens: Tensor) -> Verdict:
    """Several calls with the state carried give what one call gives."""
    name, length = "split invariance", tokens.shape[1]
    if not subject.has_state:
        return Verdict(name, None, "the target has no initial_state(batch)")
    y = subject(tokens)
    third = max(1, length // 3)
    largest = 0.0
    for parts in (
        [length],
        [length // 2, length - length // 2],
        [1, length - 1],
        [third, third + 1, length - 2 * third - 1],
    ):
        change = (subject.in_parts(tokens, parts) - y).abs().amax((0, 2))
        if change.max() > rounding(y):
            cut = " + ".join(map(str, parts)) + " tokens" if len(parts) > 1 else "all tokens from an initial state"
            return Verdict(name, False, f"{cut} changed output {int(change.argmax())} by {float(change.max()):.1e}")
        largest = max(largest, float(change.max()))
    return Verdict(name, True, f"largest change in 2 or 3 calls {largest:.1e}")


@torch.no_grad()
def recurrence_equality(subject: Subject, tokens: Tensor) -> Verdict:
    """The memory's chunked form gives what its definition gives token by token."""
    name, model = "recurrence equality", subject.target
    if not isinstance(model, LanguageModel):
        return Verdict(name, None, "only models of titans_dist have both forms")
    memories = [module for module in model.modules() if isinstance(module, InnerMemory)]
    if not memories:
        return Verdict(name, None, "the model has no memory")
    y = subject(tokens)
    usual = [memory.backend for memory in memories]
    for memory in memories:
        memory.backend = "recurrent"
    try:
        change = (subject(tokens) - y).abs().amax((0, 2))
    finally:
        for memory, backend in zip(memories, usual, strict=True):
            memory.backend = backend
    if change.max() > rounding(y):
        evidence = f"token by token, output {int(change.argmax())} differs by {float(change.max()):.1e}"
        return Verdict(name, False, evidence)
    return Verdict(name, True, f"largest difference from the form token by token {float(change.max()):.1e}")


def rounding(y: Tensor) -> float:
    """What another order of the same sums may change outputs such as `y` by."""
    return float(torch.finfo(y.dtype).eps ** 0.5 * y.abs().max())


def _listed(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
