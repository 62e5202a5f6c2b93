"""Bringing what the coming steps read to this machine, ahead of the reader."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from titans_data.errors import DataError


class Prefetch:
    """A thread that fetches the rows of the `ahead` steps after the one that is being read.

    `rows(step)` are the rows of a step and `fetch(row)` brings one; both are called in the thread. The files that are
    fetched serve all processes of the machine. What cannot be fetched is left to the reader, which says why.
    """

    def __init__(
        self, rows: Callable[[int], Iterable[int]], fetch: Callable[[int], None], start_step: int, ahead: int
    ) -> None:
        self._rows, self._fetch, self._next, self._ahead = rows, fetch, start_step, ahead
        self._reading = start_step
        self._moved = threading.Condition()
        self._stopped = False
        threading.Thread(target=self._run, name="prefetch", daemon=True).start()

    def reading(self, step: int) -> None:
        """Say that `step` is read now."""
        with self._moved:
            self._reading = step
            self._moved.notify()

    def stop(self) -> None:
        """End the thread once it is done with the row at hand."""
        with self._moved:
            self._stopped = True
            self._moved.notify()

    def _run(self) -> None:
        while True:
            with self._moved:
                self._moved.wait_for(lambda: self._stopped or self._next <= self._reading + self._ahead)
                if self._stopped:
                    return
            for row in self._rows(self._next):
                if self._stopped:
                    return
                try:
                    self._fetch(row)
                except DataError:
                    continue
            self._next += 1
