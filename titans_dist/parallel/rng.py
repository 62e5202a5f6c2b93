"""The state of torch's random numbers in a checkpoint.

Training draws none: weights come from a seed, and no layer is random. A layer of a user's may; then it goes on after a
load where rank 0 was. All ranks get the same state, so what must differ between them has to have its own generator.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor

_CUDA_BYTES = 16
"""Size of a CUDA generator's state: seed and offset."""


def rng_sharded_state() -> dict[str, Any]:
    """The states of the CPU's and this device's default generators, uint8; of a machine without CUDA zeros."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.zeros(_CUDA_BYTES, dtype=torch.uint8)
    states = {"cpu": torch.get_rng_state(), "cuda": cuda}
    return {
        name: ShardedTensor.from_rank_offsets(f"rng.{name}", state, replica_id=dist.get_rank())
        for name, state in states.items()
    }


def load_rng(loaded: dict[str, Any]) -> None:
    """Take over a loaded `rng_sharded_state`."""
    torch.set_rng_state(loaded["cpu"])
    if torch.cuda.is_available() and loaded["cuda"].any():
        torch.cuda.set_rng_state(loaded["cuda"])
