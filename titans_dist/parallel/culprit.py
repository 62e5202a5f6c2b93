"""Which part of the model first gave a number that is not finite. Looked for only once a step has failed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

Place = tuple[int, int, str]
"""The number of the block, what the order inside it is, and the path of a module or parameter."""


Gradient = Callable[[nn.Parameter], Tensor]
"""What is left of a parameter's gradient after a step: all of it, or as little as its largest size."""


def main_grad(value: nn.Parameter) -> Tensor:
    """Where megatron-core collects it."""
    return value.main_grad  # type: ignore[attr-defined]


def find_culprit(models: list[nn.Module], forward: Callable[[], object], gradient: Gradient = main_grad) -> str:
    """A sentence that names it, the same on every rank. Collective: `forward` runs the parts of the model that this
    rank has as the failed step did.

    Every rank runs all of it, whatever it finds, because the modules communicate. Of what the ranks find, the earliest
    counts. `gradient` must still give those of the failed step.
    """
    found = _agreed(first_output(models, forward))
    if found is not None:
        return f"the first output that is not finite is that of {found}"
    found = _agreed(_first_gradient(models, gradient))
    if found is not None:
        return f"every output is finite; backward from the loss, the first gradient that is not is that of {found}"
    largest = _largest_gradient(models, gradient)
    return f"every output and every gradient is finite; the largest gradient is that of {largest}"


def first_output(models: list[nn.Module], forward: Callable[[], object]) -> Place | None:
    """The first call that makes something not finite of what is; parts return first.

    Where a part is already handed what is not finite, its whole has made that between its parts.
    """
    calls = 0
    found: list[Place] = []

    def hook(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal calls
            calls += 1
            if not found and not _is_finite(output):
                maker = path if _is_finite(inputs) else path.rpartition(".")[0]
                found.append((_block(path), calls, maker or "the model"))

        return look

    named = [item for model in models for item in model.named_modules()]
    hooks = [module.register_forward_hook(hook(path)) for path, module in named]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in hooks:
            handle.remove()
    return found[0] if found else None


def _first_gradient(models: list[nn.Module], gradient: Gradient) -> Place | None:
    """The last parameter in the order of the forward pass whose gradient is not finite: backward was there first."""
    named = [item for model in models for item in model.named_parameters()]
    for number, (path, value) in enumerate(reversed(named)):
        if not gradient(value).isfinite().all():
            return -_block(path), number, path
    return None


def _largest_gradient(models: list[nn.Module], gradient: Gradient) -> str:
    """Of all ranks, with its size."""
    named = [item for model in models for item in model.named_parameters()]
    sizes = [(float(gradient(value).abs().max()), path) for path, value in named]
    size, path = max(_gathered(max(sizes)))
    return f"{path} ({size:.1e})"


def _block(path: str) -> int:
    """Where a path is in the order of the forward pass, as far as pipeline stages differ."""
    room, _, rest = path.partition(".")
    if room == "blocks":
        return int(rest.partition(".")[0])
    return -1 if room == "embedding" else 1 << 30


def _agreed(found: Place | None) -> str | None:
    """What comes first of what all ranks have found, and where, if not on all of them."""
    places = _gathered(found)
    if not any(places):
        return None
    first = min(place for place in places if place is not None)
    peers = len(places) // parallel_state.get_pipeline_model_parallel_world_size()  # that have the same blocks
    return first[2] if places.count(first) == peers else f"{first[2]} in process {places.index(first)}"


def _gathered(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _is_finite(value: Any) -> bool:
    return all(bool(x.isfinite().all()) for x in _tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of floating point numbers in an output: a tensor, or a tuple, list or dataclass of outputs."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
