"""Child processes that get the signals meant for the job, and that can be ended with everything below them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

import psutil

KILL_TIMEOUT_S = 10.0
"""Seconds to wait for killed processes; the kernel may hold one in a device driver for a while."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Child:
    """A child process in a session of its own: the first signal asks it to stop, the second one kills it.

    A session of its own, because Ctrl-C in a terminal goes to every process of the job at once, and torchrun would
    pass it on a second time.
    """

    def __init__(self, arguments: Sequence[str], **options: Any) -> None:
        self.signalled = False
        self.is_killed = False
        """Whether a second signal has killed it."""
        self._arguments, self._options = arguments, options
        self._earlier: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Child:
        # Before the start, so that no signal falls between the two.
        self.process: subprocess.Popen[bytes] | None = None
        for signum in _SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                self._earlier[signum] = signal.signal(signum, self._forward)
        self.process = subprocess.Popen(self._arguments, start_new_session=True, **self._options)
        if self.signalled:
            self.process.terminate()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._earlier.items():
            signal.signal(signum, handler)
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def wait(self, timeout_s: float | None = None) -> int | None:
        """The exit code, or None if the child still runs after `timeout_s`."""
        assert self.process is not None
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """End the child and everything below it with SIGKILL."""
        assert self.process is not None
        kill_tree(self.process.pid)
        self.process.wait()

    def _forward(self, signum: int, frame: FrameType | None) -> None:
        again, self.signalled = self.signalled, True
        if self.process is not None and self.process.returncode is None:
            if again:
                self.is_killed = True
                kill_tree(self.process.pid)
            else:
                self.process.terminate()


def kill_tree(pid: int) -> None:
    """SIGKILL the child process `pid` and all its descendants, whatever session they are in."""
    try:
        root = psutil.Process(pid)
        root.suspend()  # it must not start anything while its children are counted
        below = root.children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for process in [root, *below]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    # The child itself is left to its Popen, which would miss the exit code if it were reaped here.
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while any(map(_runs, below)) and time.monotonic() < deadline:
        time.sleep(0.01)


def end_marked(variable: str, value: str, word: str, timeout_s: float) -> None:
    """End what is left of a job whose head has died: SIGTERM, and after `timeout_s` SIGKILL.

    Ended are the processes with `variable=value` in their environment and `word` in their command line: not helpers
    such as that of Weights & Biases, which end by themselves once they have sent everything.
    """
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_ours = process.pid != os.getpid() and any(word in part for part in process.cmdline())
            if is_ours and process.environ().get(variable) == value:
                process.terminate()
                left.append(process)
    _, stubborn = psutil.wait_procs(left, timeout_s)
    for process in stubborn:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(stubborn, KILL_TIMEOUT_S)


def is_running(pid: int) -> bool:
    """Whether there is such a process, one that only waits to be buried aside."""
    try:
        return _runs(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
