"""Which bytes are there at a moment: every tensor that torch makes, its storage counted once, until it is dropped.

    with Live() as live:
        y = model(x)
    print(live.now, live.peak)

Seen is what passes torch's dispatcher, forward and backward, of real tensors and of fake ones alike. Unlike hooks on
saved tensors it also sees what a checkpoint or a closure keeps alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from titans_dist.memory import fused, writes


class Live(TorchDispatchMode):
    """Bytes of the tensors made inside the block: `now`, and `peak`, the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages: dict[int, tuple[Any, int]] = {}  # by their address
        self._states: set[int] = set()
        self._settled: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else every call goes through a guard against the compiler

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._see(x.untyped_storage())
        return result

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now

    def of(self, tensors: Iterable[Tensor | None]) -> int:
        """Bytes behind some tensors, each storage once."""
        keys = {x.untyped_storage()._cdata for x in tensors if x is not None}
        return sum(self._storages[key][1] for key in keys if key in self._storages)

    def settle(self) -> None:
        """What is there now are no states, whatever `mark_states` says: the weights that a memory begins with."""
        self._settled = set(self._storages)

    def states(self) -> int:
        """Bytes of all states of memories that are there."""
        return sum(self._storages[key][1] for key in self._states)

    def mark_states(self, tensors: Iterable[Tensor]) -> None:
        """These are states of memories."""
        self._states.update(x.untyped_storage()._cdata for x in tensors)
        self._states &= self._storages.keys() - self._settled

    def _see(self, storage: UntypedStorage) -> None:
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()

        def drop(_: Any) -> None:
            del self._storages[key]
            self._states.discard(key)
            self._settled.discard(key)
            self.now -= size

        self._storages[key] = (weakref.ref(storage, drop), size)
        self.now += size
        self.peak = max(self.peak, self.now)


@contextmanager
def states_marked(live: Live) -> Iterator[None]:
    """Tell `live` of every state of a memory: what goes from chunk to chunk, and what chunks leave for the reads."""

    def marked(kind: type, tensors: Any) -> Any:
        made = kind.__init__  # type: ignore[misc]

        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            made(self, *args, **kwargs)
            live.mark_states(x for x in tree_leaves(tensors(self, *args)) if isinstance(x, Tensor))

        return mock.patch.object(kind, "__init__", init)

    with ExitStack() as stack:
        stack.enter_context(marked(writes.Carry, lambda made, *_: [made.slots, made.anchor]))
        stack.enter_context(marked(writes.Written, lambda made, *_: [made.slots, made.fresh]))
        stack.enter_context(marked(fused._Slots, lambda made, states, slots: [states]))
        yield
