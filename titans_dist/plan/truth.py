"""The formulas beside the real model: what `titans-dist plan --verify` compares, part by part.

`titans_dist.parallel.fake` runs the real model of one process on tensors without numbers. It knows no kernels, so both
sides are those of the memory in torch on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf

from titans_dist.config import Config
from titans_dist.plan import flops
from titans_dist.plan.communication import analytic
from titans_dist.plan.memory import Memory, memory_of, workspace
from titans_dist.plan.place import Place

PARTS = ("parameters", "gradients", "optimizer", "activations", "states", "logits")
OF_DOCUMENTS = ("activations", "states", "peak", "FLOPs")
LIMITS = {**dict.fromkeys(PARTS, 0.02), "activations": 0.1, "logits": 0.1, "peak": 0.25, "FLOPs": 0.1}
"""How far a formula may be off, as a share of what the real model has."""
SENT = 1e-9


@dataclass(frozen=True)
class Compared:
    """One number of one process."""

    what: str
    planned: float
    real: float
    limit: float

    @property
    def difference(self) -> float:
        """Of the plan, as a share of the real one."""
        if self.real == self.planned:
            return 0.0
        return self.planned / self.real - 1 if self.real else inf

    @property
    def holds(self) -> bool:
        """Whether it is within the limit."""
        return abs(self.difference) <= self.limit


@dataclass(frozen=True)
class Ran:
    """What the real model of one process had and did in one step."""

    memory: Memory
    peak: int
    """The most bytes that were there at once, temporary ones as well."""
    flops: float
    """Of one micro-batch."""
    micro_batches: int
    sent: Mapping[tuple[str, str], tuple[int, float]]
    """(kind, operation) -> calls, bytes."""


def compare(config: Config, copies: int, stage: int, share: int, ran: Ran) -> list[Compared]:
    """Every number of the process of pipeline `stage` with the `share`-th part of each sequence."""
    config = in_torch(config)
    planned = memory_of(config, copies, stage, share)
    # Where documents begin depends on the data, and what that takes is not planned.
    limits: dict[str, float] = {
        **LIMITS,
        **dict.fromkeys(OF_DOCUMENTS if config.data.documents == "packed" else (), inf),
    }
    if config.model.variant == "transformer" and config.parallel.context > 1:
        limits["FLOPs"] = inf  # each part of a sequence sees more keys than the one before; planned is their average
    found = [Compared(name, getattr(planned, name), getattr(ran.memory, name), limits[name]) for name in PARTS]
    beside = max(0, workspace(config, copies, stage, share) - planned.logits)
    found.append(Compared("peak, with workspace", planned.total() + beside, ran.peak, limits["peak"]))
    found.append(Compared("FLOPs", _flops(Place(config, copies, stage, share)), ran.flops, limits["FLOPs"]))
    # As many micro-batches as were run.
    batch = ran.micro_batches * copies * config.training.micro_batch_size
    training = replace(config.training, global_batch_size=batch)
    sent: dict[tuple[str, str], tuple[int, float]] = {}
    for one in analytic(replace(config, training=training), copies, stage, share):
        calls, size = sent.get((one.kind, one.operation), (0, 0.0))
        sent[one.kind, one.operation] = calls + one.calls, size + one.size_bytes
    real = {key: value for key, value in ran.sent.items() if key[0] != "control"}
    for key in sorted(sent | real):
        for i, what in enumerate(("calls", "bytes")):
            planned_, real_ = sent.get(key, (0, 0.0))[i], real.get(key, (0, 0.0))[i]
            found.append(Compared(f"{key[0]} {key[1]} {what}", planned_, real_, SENT))
    return found


def in_torch(config: Config) -> Config:
    """The same without kernels, and without a compiler."""
    memory = replace(config.model.memory, backend="torch")
    training = replace(config.training, device="cpu")
    return replace(config, model=replace(config.model, memory=memory), training=training)


def _flops(place: Place) -> float:
    """Of one micro-batch of this process, with what is worked out again."""
    blocks, head = flops.performed_by(place.config)
    count = sum(number for number, _, _ in place.own)
    is_last = any(last for _, _, last in place.own)
    return (count * blocks.total() + is_last * head.total()) * place.positions / place.config.parallel.tensor
