"""The watch of a process over itself: one that makes no progress ends, so that the launcher can start all again.

The rules, in jobs of several processes. Progress is a mark (`peers.mark`) or a collective that is over.

* From the first mark on, no progress for `timeout_s` outside of any collective: the process hangs.
* The same and some seconds more inside of one: it should have failed by itself and did not.
* Another process has ended with an error, or has been silent for a minute, and `GONE_S` later there is still no
  progress: what this one waits for will never come.

A process that is `busy`, or on its way out with an exception, is left alone. A thread that hangs in C code and keeps
Python's lock lets no other thread run, the watch neither: after `timeout_s` and a minute of that, faulthandler writes
the stacks to stderr and ends the process with exit code 1.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable

from titans_dist.parallel import main_thread

BEAT_S = 1.0
GONE_S = 20.0
"""How long a process goes on without progress once another one is known to be gone."""
LATE_S = 10.0
"""How much later than the timeout of a collective, whose error says more, the watch ends a process that waits in it."""
_LOCKED_S, _STDERR = 60.0, 2


class Watch:
    """Counts how long this process stands still, and calls `end(still_s)` where that is too long."""

    def __init__(self, timeout_s: float, end: Callable[[float], None]) -> None:
        self.timeout_s, self.end = timeout_s, end
        self.marks = self.busy = 0
        self.still_s = 0.0
        """Seconds without progress."""
        self.is_off = False
        """Set where the process is on its way out already."""
        self.is_broken = False
        """Set where another process is known to be gone."""
        self._seen = (0, 0)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """End it."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(2 * BEAT_S)
        faulthandler.cancel_dump_traceback_later()

    def has_moved(self) -> bool:
        """Whether there was progress since the last question, or there need not be any."""
        before, self._seen = self._seen, (self.marks, main_thread.completed())
        excused = self.busy or self.is_off or self._stopped.is_set() or main_thread.is_unwinding()
        return self._seen != before or bool(excused)

    def _run(self) -> None:
        moved = whole = time.monotonic()
        while not self._stopped.wait(BEAT_S):
            now = time.monotonic()
            if self.has_moved():
                moved = now
            self._guard()
            self.still_s = now - moved
            if not self.is_broken or not self.still_s:
                whole = now
            if self._is_late() or now - whole > GONE_S:
                self.end(self.still_s)

    def _is_late(self) -> bool:
        if not self.marks or self.still_s <= self.timeout_s:
            return False
        return self.still_s > self.timeout_s + LATE_S or main_thread.place().collective is None

    def _guard(self) -> None:
        """Have this process ended if the watch itself does not run any more."""
        if self.marks and not self.busy and not self.is_off:
            faulthandler.dump_traceback_later(self.timeout_s + _LOCKED_S, exit=True, file=_STDERR)
        else:
            faulthandler.cancel_dump_traceback_later()


def end_process(code: int) -> None:
    """End this process at once, whatever its threads do, and those that it has started."""
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
