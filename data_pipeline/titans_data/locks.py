"""Locks between the processes and threads of a node that end with their holder, however it ends.

A lock is a flock on an open file: the file that stays behind means nothing.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_held: set[int] = set()


def take_lock(path: Path, wait: bool = True) -> int | None:
    """Lock the file at `path`, made if needed, for `release_lock`; None when another holds it and `wait` is false."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    _held.add(descriptor)
    return descriptor


def release_lock(descriptor: int) -> None:
    _held.discard(descriptor)
    # By name, because a process that was forked meanwhile may have the file open too.
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock on the file at `path`."""
    descriptor = take_lock(path)
    assert descriptor is not None
    try:
        yield
    finally:
        release_lock(descriptor)


def _let_go() -> None:
    """In a forked child: the locks are its parent's, and must not outlive the parent here."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
