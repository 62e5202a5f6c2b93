"""Reads and writes of one layer where every channel of the head has its own gates.

The gates (..., D, b, ...) act on the axis of the layer that has the head's D channels: the inputs of the first layer,
the outputs of the last one of a deep memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_dist.memory.gates import ChunkGates
from titans_dist.memory.spec import MemorySpec


def acts_on_outputs(spec: MemorySpec, layer: int) -> bool:
    """Whether the channels are a layer's output axis."""
    return spec.depth > 1 and layer == spec.depth - 1


def write(
    spec: MemorySpec, layer: int, past: list[Tensor], a: Tensor, delta: Tensor, gates: ChunkGates
) -> list[Tensor]:
    """The slots (G, d_in, d_out) after a chunk: past the same, a (G, b, d_in), delta (G, b, d_out)."""
    held = torch.stack(past, 1)
    if acts_on_outputs(spec, layer):
        kept = torch.einsum("gcnm,gmic->ngic", gates.keep, held)
        return list(kept + torch.einsum("gti,gctn,gtc->ngic", a, gates.add, delta))
    kept = torch.einsum("gcnm,gmco->ngco", gates.keep, held)
    return list(kept + torch.einsum("gtc,gctn,gto->ngco", a, gates.add, delta))


def read(
    spec: MemorySpec, layer: int, x: Tensor, slots: list[Tensor], a: Tensor, delta: Tensor, gates: ChunkGates
) -> Tensor:
    """x W_t for every token t: x (N, G, b, d_in), slots (N, G, d_in, d_out) -> (N, G, b, d_out)."""
    past = gates.past.unbind(-1)  # (N, G, D, b) for each slot
    if acts_on_outputs(spec, layer):
        z = sum((gate.mT * (x @ slot) for gate, slot in zip(past, slots, strict=True)), x.new_zeros(()))
        if gates.write is None:
            return z
        scores = gates.write * (x @ a.mT).unsqueeze(-3)
        return z + torch.einsum("...cti,...ic->...tc", scores, delta)
    z = sum(((gate.mT * x) @ slot for gate, slot in zip(past, slots, strict=True)), x.new_zeros(()))
    if gates.write is None:
        return z
    return z + torch.einsum("...tc,...ic,...cti->...ti", x, a, gates.write) @ delta
