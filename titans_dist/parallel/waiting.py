"""Whether, and how long, the main thread waits for other processes.

Whatever torch.distributed waits for on the CPU, it waits for in `Work.wait`: collectives, messages, what was begun in
the background. There the time is taken, by the thread that waits. (To look at its frames from another thread would say
the same, and crashes Python 3.11 now and then.) With NCCL `wait` returns at once.
"""

from __future__ import annotations

import functools
import threading
import time
from typing import Any

from torch._C._distributed_c10d import Work

_waited_s = 0.0
_is_waiting = False


def waited_s() -> float:
    """Seconds that the main thread of this process has waited since the first call of this or of `is_waiting`."""
    if not hasattr(Work.wait, "__wrapped__"):
        Work.wait = _timed(Work.wait)  # type: ignore[method-assign]
    return _waited_s


def is_waiting() -> bool:
    """Whether it waits now. For another thread to ask."""
    waited_s()
    return _is_waiting


def _timed(wait: Any) -> Any:
    main = threading.main_thread().ident

    @functools.wraps(wait)
    def timed(*arguments: Any, **options: Any) -> Any:
        global _waited_s, _is_waiting
        if threading.get_ident() != main:  # the one that saves in the background waits for others too
            return wait(*arguments, **options)
        began, _is_waiting = time.perf_counter(), True
        try:
            return wait(*arguments, **options)
        finally:
            _waited_s, _is_waiting = _waited_s + time.perf_counter() - began, False

    return timed
