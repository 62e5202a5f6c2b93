"""Requests to stop, remembered until the loop asks."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Set by SIGTERM, SIGINT or SIGUSR1. A rank must not act on it alone: the ranks agree between two steps."""

    def __init__(self) -> None:
        self.signal: str | None = None
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name

    def __bool__(self) -> bool:
        return self.signal is not None
