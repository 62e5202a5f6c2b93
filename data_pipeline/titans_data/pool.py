"""Tasks on several processes that neither outlive their parent nor keep it waiting."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

from titans_data.errors import DataError

_REPORT_EVERY_S = 0.5


class Task(Protocol):
    @property
    def size_bytes(self) -> int:
        """How much of the whole the task is."""


T = TypeVar("T", bound=Task)
Advance = Callable[[int], None]
"""Told by a task how many of its bytes are done."""


def usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def run(
    function: Callable[[T, Advance], None],
    tasks: Sequence[T],
    workers: int,
    folder: Path,
    report: Callable[[int], None],
) -> None:
    """Call function(task, advance) for every task; `report` hears the bytes that are done, of all tasks together.

    With one worker, or one task, all runs in this process. Raises what a task raised, the first in order, when the
    tasks that run beside it are done, and DataError when a worker dies.
    """
    if workers == 1 or len(tasks) <= 1:
        done = 0
        for task in tasks:
            before = done
            function(task, lambda part, before=before: report(before + part))  # type: ignore[misc]
            done += task.size_bytes
            report(done)
        return
    with _Workers(min(workers, len(tasks)), folder) as pool:
        _share(pool, function, tasks, report)


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    number: int | None = None
    """The task it is at; None while it waits for one."""
    advanced: int = 0


class _Workers:
    """Processes that are given tasks through pipes; leaving by an exception kills them.

    concurrent.futures would do, but for its semaphores: named ones, which stay in /dev/shm for ever when all processes
    are killed at once.
    """

    def __init__(self, count: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.workers = []
        for _ in range(count):
            pipe, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, str(folder)), daemon=True)
            process.start()
            theirs.close()  # so that this end hears of a worker's death
            self.workers.append(_Worker(process, pipe))

    def __enter__(self) -> list[_Worker]:
        return self.workers

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self.workers:
            worker.pipe.close()  # a worker leaves when it hears of this, whatever it is at
        for worker in self.workers:
            worker.process.join()


def _share(
    workers: list[_Worker], function: Callable[[T, Advance], None], tasks: Sequence[T], report: Callable[[int], None]
) -> None:
    waiting = iter(range(len(tasks)))
    errors: dict[int, BaseException] = {}
    done = 0

    def next_task(worker: _Worker) -> None:
        worker.number, worker.advanced = None if errors else next(waiting, None), 0
        if worker.number is not None:
            worker.pipe.send((function, tasks[worker.number]))

    try:
        for worker in workers:
            next_task(worker)
        while busy := {worker.pipe: worker for worker in workers if worker.number is not None}:
            for pipe in wait(list(busy), timeout=_REPORT_EVERY_S):
                worker = busy[pipe]  # type: ignore[index]
                message = worker.pipe.recv()
                if isinstance(message, int):
                    worker.advanced = message
                    continue
                assert worker.number is not None
                if message is None:
                    done += tasks[worker.number].size_bytes
                else:
                    errors[worker.number] = message
                next_task(worker)
            report(done + sum(worker.advanced for worker in workers))
    except (EOFError, ConnectionError) as error:
        raise DataError(
            "a worker process of prepare was killed: run the same command again, it goes on where this one stopped; "
            "if memory ran out, with fewer workers"
        ) from error
    if errors:
        raise errors[min(errors)]


# ---- in a worker


def _work(pipe: Connection, folder: str) -> None:
    from titans_data.work import join_workers

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches the parent too, which decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # One core per worker: its libraries start no threads.
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    handle = join_workers(Path(folder))
    assert handle is not None  # held for as long as the process lives
    for function, task in iter(_Tasks(pipe).get, None):
        try:
            function(task, pipe.send)
            pipe.send(None)
        except Exception as error:
            pipe.send(error)


class _Tasks:
    """What arrives through the pipe, heard by a thread: its end ends the process, in the middle of a task too."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._arrived: Any = None
        self._change = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def get(self) -> Any:
        """Wait for the next task."""
        with self._change:
            self._change.wait_for(lambda: self._arrived is not None)
            task, self._arrived = self._arrived, None
            return task

    def _listen(self) -> None:
        while True:
            try:
                task = self._pipe.recv()
            except (EOFError, OSError):
                os._exit(1)
            with self._change:
                self._arrived = task
                self._change.notify()
