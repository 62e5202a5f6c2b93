"""Without packed documents nothing asks the device for a number: no step waits for a GPU, a CUDA graph can capture it.

Shown without a GPU on tensors of the meta device, which have shapes and no numbers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.memory.cases import KINDS
from tests.model.models import MODELS
from titans_dist.memory import MemorySpec, MemoryState, neural_memory
from titans_dist.model import LanguageModel

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.repeat_interleave,
    aten.equal,
    aten.is_nonzero,
    aten.bincount,
}
"""Operations whose result, or its shape, is a number on the device."""


class NoSync(TorchDispatchMode):
    """Raises where an operation would wait for a device, or would take part on another than the rest."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        by_mask = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if func.overloadpacket in WAITS or by_mask:
            raise AssertionError(f"{func} waits for the device")
        result = func(*args, **kwargs)
        for x in tree_leaves((args, kwargs, result)):
            if isinstance(x, Tensor) and x.device.type != "meta":
                raise AssertionError(f"{func} has a tensor on {x.device}")
        return result


def call(spec: MemorySpec, chunk_size: int, **options: Any) -> tuple[Tensor, MemoryState]:
    """The operator on 12 tokens, forward and backward."""
    shape, gate = (2, 12, 2, 4), (2, 12, 2, 4) if spec.channel_wise else (2, 12, 2)

    def leaf(*sizes: int) -> Tensor:
        return torch.empty(sizes, device="meta", requires_grad=True)

    y, state = neural_memory(
        *(leaf(*shape) for _ in range(3)),
        spec=spec,
        weights=[leaf(2, *size) for size in spec.shapes(4)],
        alpha=leaf(*gate),
        eta=leaf(*gate),
        theta=leaf(*gate),
        delta=leaf(2, 12, 2),
        norm=(leaf(4), leaf(4)),
        chunk_size=chunk_size,
        **options,
    )
    (y.sum() + sum(w.sum() for w in state.weights)).backward()
    return y, state


@pytest.mark.parametrize(
    ("read", "recompute", "clip"), [("after", False, None), ("before", True, 1000.0), ("start", False, 1000.0)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_memory_never_waits(kind: str, read: str, recompute: bool, clip: float | None, monkeypatch: Any) -> None:
    monkeypatch.setattr("titans_dist.memory.chunked.GROUP_TOKENS", 4)  # several groups
    spec = KINDS[kind]
    with NoSync():  # the last chunk is not whole
        call(spec, 5 if spec.has_chunked_form else 1, read=read, recompute=recompute, state_grad_clip=clip)


@pytest.mark.parametrize("kind", KINDS)
def test_the_recurrence_never_waits(kind: str) -> None:
    spec = KINDS[kind]
    with NoSync():
        call(spec, 5 if spec.has_chunked_form else 1, backend="recurrent")


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_never_waits(name: str) -> None:
    with torch.device("meta"):
        model = LanguageModel(MODELS[name]).to("meta")  # a constant is made on the CPU all the same
        tokens = torch.empty(2, 22, dtype=torch.int64)
    model.set_recompute("selective")
    with NoSync():
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: x + torch.zeros(3),
        lambda x: torch.repeat_interleave(x, x.long()),
    ],
)
def test_what_waits_is_noticed(wrong: Any) -> None:
    with NoSync(), pytest.raises((AssertionError, RuntimeError)):
        wrong(torch.empty(3, device="meta"))
