"""Work that every rank of a group does at the same time, where all learn how it went on each.

A rank that fails alone would leave the others waiting in their next collective. So a phase of work has no collective
inside and ends with the exchange of everybody's outcome: either all go on, or all raise the same sentence.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from titans_dist.config.errors import CheckpointError

_Result = TypeVar("_Result")

_TICK_S = 1.0
"""Far below any timeout of a process group."""


class AgreedFailure(Exception):
    """Raised on every rank at the same place, with the same sentence; `kind` names the class of the first error."""

    def __init__(self, sentence: str, kind: str) -> None:
        super().__init__(sentence)
        self.kind = kind


class Agreement:
    """All ranks as one, over the group that is given: None is the default one."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def agreed(self, work: Callable[[], _Result]) -> _Result:
        """Run ``work`` here, then learn how it went on all; raises AgreedFailure on all when it failed on one."""
        result: Any = None
        problem: tuple[str, str] | None = None
        try:
            result = work()
        except (Exception, CheckpointException) as error:  # whatever it is, the peers must hear of it and not wait
            problem = sentence(error), type(error).__name__
        problems: list[tuple[str, str] | None] = [None] * self.world
        dist.all_gather_object(problems, problem, group=self.group)
        failed = [(rank, *problem) for rank, problem in enumerate(problems) if problem is not None]
        if failed:
            rank, text, kind = failed[0]
            others = f" (and {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
            raise AgreedFailure(f"rank {rank}{others}: {text}", kind)
        return result

    def patiently(self, work: Callable[[], _Result]) -> _Result:
        """``agreed`` for work that may take some ranks much longer than others: longer than a collective may wait."""
        outcomes: list[Callable[[], _Result]] = []
        thread = threading.Thread(target=lambda: outcomes.append(outcome(work)), daemon=True)
        thread.start()
        while True:
            thread.join(_TICK_S)
            if all(self.everybody(bool(outcomes))):
                return self.agreed(outcomes[0])

    def on_rank_0(self, work: Callable[[], _Result]) -> _Result:
        """Run ``work`` on rank 0 and give its result to all; raises AgreedFailure on all when it failed."""
        result = [self.agreed(lambda: work() if self.rank == 0 else None)]
        dist.broadcast_object_list(result, src=0, group=self.group)
        return result[0]  # type: ignore[return-value]

    def gathered(self, value: Any) -> list[Any]:
        """The values of all ranks on rank 0, an empty list elsewhere."""
        values: list[Any] = [None] * self.world if self.rank == 0 else []
        dist.gather_object(value, values or None, dst=0, group=self.group)
        return values

    def everybody(self, value: _Result) -> list[_Result]:
        """The values of all ranks on all."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values


def outcome(work: Callable[[], _Result]) -> Callable[[], _Result]:
    """Do the work now; what is returned gives its result when called, or raises its error."""
    try:
        result = work()
    except BaseException as error:
        failure = error

        def fail() -> _Result:
            raise failure

        return fail
    return lambda: result


def sentence(error: BaseException) -> str:
    """One line for ``error``, or for the cause of it that a person can mend.

    torch hides "No space left on device" behind an error of its own zip writer, and wraps the failures of a load.
    """
    if isinstance(error, CheckpointException):  # a BaseException of torch, the same on all ranks
        rank, (failure, _) = next(iter(error.failures.items()))
        return f"{sentence(failure)} (on rank {rank})"
    if isinstance(error, pickle.UnpicklingError):  # torch's text is an advice to unpickle anything
        return "a file of tensors is damaged and cannot be read"
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError | CheckpointError):
        cause = cause.__cause__ or cause.__context__
    shown = cause or error
    line = (str(shown).strip().splitlines() or ["no message"])[0]
    return line if shown is cause else f"{type(shown).__name__}: {line}"
