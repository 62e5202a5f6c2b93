"""What this process really sends: every communication call of a block of code, by what it is for.

    with count_communication() as sent:
        engine.step(batches)
    print(sent.bytes_of("tensor"))

Seen is what passes torch's dispatcher on its way to a backend: collectives and messages between two processes, of the
forward and the backward pass, asynchronous, coalesced and of objects, whoever calls them and by whatever name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron.core import parallel_state
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from titans_dist.plan.communication import KINDS, Traffic


@dataclass
class Sent:
    """Calls of one kind and operation, and the bytes that they made this process send."""

    calls: int = 0
    size_bytes: float = 0.0


@dataclass
class Communication:
    """What `count_communication` has counted, by (kind, operation).

    Kinds are `KINDS` of `titans_dist.plan.communication`. Groups of one process count nothing. A process of n sends,
    with the ring algorithms that backends use for tensors of size:

    * all_reduce: 2 (n - 1) / n of the tensor;
    * all_gather, reduce_scatter: (n - 1) / n of the whole tensor, that which all processes' parts make up;
    * all_to_all: (n - 1) / n of its tensor, or what its own split sizes say;
    * send: all of it. What is received is the sender's to count;
    * broadcast, scatter, gather, reduce: what leaves this process, if it is the one, or one of those, that send;
    * barrier: nothing, but it is a call.
    """

    counts: dict[tuple[str, str], Sent] = field(default_factory=dict)

    def add(self, kind: str, operation: str, size_bytes: float) -> None:
        """One call more."""
        sent = self.counts.setdefault((kind, operation), Sent())
        sent.calls += 1
        sent.size_bytes += size_bytes

    def calls_of(self, kind: str) -> int:
        """Calls of one kind, of all operations."""
        return sum(sent.calls for (name, _), sent in self.counts.items() if name == kind)

    def bytes_of(self, kind: str) -> float:
        """Bytes of one kind, of all operations."""
        return sum(sent.size_bytes for (name, _), sent in self.counts.items() if name == kind)


@contextmanager
def count_communication() -> Iterator[Communication]:
    """Count what this process sends inside the block; nested blocks both count.

    Every torch call inside takes some microseconds more: do not time what is counted. Outside, nothing is different.
    megatron-core's groups must have been made before; those made inside count as control.
    """
    found = Communication()
    with _Counter(found):
        yield found


class Row(NamedTuple):
    """One line of the report: calls and bytes of one step, as counted and as worked out beforehand."""

    kind: str
    calls: int
    measured_bytes: float
    analytic_bytes: float | None
    """None for control messages, which are not worked out: some tens of bytes."""
    ratio: float | None
    """measured / analytic; None where that is not a number."""

    def texts(self) -> tuple[str, str, str, str, str]:
        """As cells of a table."""
        analytic = "-" if self.analytic_bytes is None else f"{self.analytic_bytes:,.0f}"
        ratio = "-" if self.ratio is None else f"{self.ratio:.4f}"
        return self.kind, f"{self.calls:,}", f"{self.measured_bytes:,.0f}", analytic, ratio


COLUMNS = ("kind", "calls", "measured bytes", "analytic bytes", "ratio")


def table(measured: Communication, analytic: Iterable[Traffic]) -> list[Row]:
    """A row for every kind of communication that one of the two has."""
    wanted: dict[str, float] = {}
    for traffic in analytic:
        wanted[traffic.kind] = wanted.get(traffic.kind, 0.0) + traffic.size_bytes
    rows = []
    for kind in KINDS:
        calls, size = measured.calls_of(kind), measured.bytes_of(kind)
        if kind == "control":
            rows.append(Row(kind, calls, size, None, None))
        elif calls or kind in wanted:
            right = wanted.get(kind, 0.0)
            rows.append(Row(kind, calls, size, right, size / right if right else None))
    return rows


class _Counter(TorchDispatchMode):
    def __init__(self, found: Communication) -> None:
        super().__init__()
        self.found, self.kinds = found, _kinds_of_groups()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Nothing that torch.compile makes communicates; else it would run uncompiled here, and from then on."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "namespace", "") == "c10d":
            self._count(func, args, kwargs or {})
        return result

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = func.name().partition("::")[2].partition(".")[0]
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        if name in _SENDS_NOTHING or "process_group" not in given:
            return
        if name not in _OPERATIONS:
            raise NotImplementedError(f"c10d::{name} is a communication call that count_communication does not know")
        group = given["process_group"]
        group = group if isinstance(group, ProcessGroup) else ProcessGroup.unbox(group)
        if group.size() == 1:
            return
        operation, size = _OPERATIONS[name]
        self.found.add(self._kind(operation, group, given), operation, size(given, group))

    def _kind(self, operation: str, group: ProcessGroup, given: dict[str, Any]) -> str:
        tensors = _flat(value for name, value in given.items() if name != "process_group")
        # Flags, counts and pickled objects; what a model computes is never an integer.
        if operation == "barrier" or not any(x.is_floating_point() for x in tensors):
            return "control"
        # megatron-core's interleaved schedule sends one of the two ways between two stages over the group of all.
        return self.kinds.get(group.group_name, "pipeline" if operation == "send" else "control")


def _kinds_of_groups() -> dict[str, str]:
    """The names of megatron-core's groups, but for those that only agree: the world's, the copies of the model."""
    groups: dict[str, list[Any]] = {
        "tensor": [parallel_state.get_tensor_model_parallel_group(check_initialized=False)],
        "context": [parallel_state.get_context_parallel_group(check_initialized=False)],
        "pipeline": [
            parallel_state.get_pipeline_model_parallel_group(check_initialized=False),
            parallel_state.get_embedding_group(check_initialized=False),
        ],
        "data": [],
    }
    if parallel_state.model_parallel_is_initialized():
        groups["data"] = [
            parallel_state.get_data_parallel_group(with_context_parallel=is_all, partial_data_parallel=is_partial)
            for is_all, is_partial in ((False, False), (True, False), (True, True))
        ]
    return {
        group.group_name: kind
        for kind, of_kind in groups.items()
        for group in of_kind
        if isinstance(group, ProcessGroup)
    }


def _flat(values: Any) -> list[Tensor]:
    """All tensors of nested lists."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        return []
    return [tensor for value in values for tensor in _flat(value)]


def _bytes(tensors: Any) -> float:
    return float(sum(x.numel() * x.element_size() for x in _flat(tensors)))


def _part(name: str, times: int = 1) -> Callable[[dict[str, Any], ProcessGroup], float]:
    """`times` (n - 1) / n of an argument."""
    return lambda given, group: times * (group.size() - 1) * _bytes(given[name]) / group.size()


def _others(given: dict[str, Any], group: ProcessGroup) -> float:
    """A list with one tensor for each process, of which one's own stays."""
    tensors: Sequence[Tensor] = given["input_tensors"]
    return _bytes(tensors) - _bytes(tensors[group.rank()])


def _to_others(given: dict[str, Any], group: ProcessGroup) -> float:
    """One tensor, split along its first dimension: evenly, or as it says."""
    sizes, whole = given["input_split_sizes"], _bytes(given["input"])
    if not sizes:
        return _part("input")(given, group)
    return whole - whole * sizes[group.rank()] / max(1, math.fsum(sizes))


def _from_root(name: str) -> Callable[[dict[str, Any], ProcessGroup], float]:
    return lambda given, group: _bytes(given[name]) if group.rank() == given["root_rank"] else 0.0


def _to_root(name: str) -> Callable[[dict[str, Any], ProcessGroup], float]:
    return lambda given, group: 0.0 if group.rank() == given["root_rank"] else _bytes(given[name])


def _scattered(given: dict[str, Any], group: ProcessGroup) -> float:
    return _bytes(given["input_tensors"]) * (group.size() - 1) / group.size()  # none but the root has inputs


_SENDS_NOTHING = ("recv_", "recv_any_source_", "check_for_nan")
_OPERATIONS: dict[str, tuple[str, Callable[[dict[str, Any], ProcessGroup], float]]] = {
    "allreduce_": ("all_reduce", _part("tensors", 2)),
    "allreduce_coalesced_": ("all_reduce", _part("tensors", 2)),
    "_allgather_base_": ("all_gather", _part("output_tensor")),
    "allgather_": ("all_gather", _part("output_tensors")),
    "allgather_coalesced_": ("all_gather", _part("output_lists")),
    "allgather_into_tensor_coalesced_": ("all_gather", _part("outputs")),
    "_reduce_scatter_base_": ("reduce_scatter", _part("input_tensor")),
    "reduce_scatter_": ("reduce_scatter", _part("input_tensors")),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", _part("inputs")),
    "alltoall_base_": ("all_to_all", _to_others),
    "alltoall_": ("all_to_all", _others),
    "send": ("send", lambda given, group: _bytes(given["tensors"])),
    "broadcast_": ("broadcast", _from_root("tensors")),
    "scatter_": ("scatter", _scattered),
    "gather_": ("gather", _to_root("input_tensors")),
    "reduce_": ("reduce", _to_root("tensors")),
    "barrier": ("barrier", lambda given, group: 0.0),
    "monitored_barrier_": ("barrier", lambda given, group: 0.0),
}
