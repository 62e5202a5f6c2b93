"""What the real model keeps for the backward pass, counted tensor by tensor on one process."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from titans_dist.config import Config
from titans_dist.model import build_model


class _Storages(TorchDispatchMode):
    """Every storage that an operation made, and what is left of them: also what checkpointing keeps in closures."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int, str]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in tree_flatten(result)[0]:
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes(), f"{function} {tuple(x.shape)}")
        return result

    def alive(self) -> Counter[str]:
        gc.collect()
        found: Counter[str] = Counter()
        for reference, size, name in self.made.values():
            if not reference.expired():
                found[name] += size
        return found


def kept(config: Config) -> Counter[str]:
    """Bytes of every storage that is there after a forward pass up to the head, by the operation that saw it last."""
    model = build_model(config.model)
    model.set_recompute(config.training.recompute)
    if config.training.precision == "bfloat16":
        model.bfloat16()
    tokens = torch.zeros(config.training.micro_batch_size, config.data.sequence_length, dtype=torch.int64)
    known = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    with _Storages() as storages:
        x, _ = model.mix(model.embedding(tokens))
    for one in known:
        storages.made.pop(one, None)
    found = storages.alive()
    assert x.grad_fn is not None
    return found
