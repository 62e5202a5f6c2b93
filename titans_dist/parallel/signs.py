"""What the processes of a job tell each other through the job's store: that they live, what they do, why they end."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import threading
import time
import uuid

import torch.distributed as dist

SILENCE_S = 3.5
"""A process that has given no sign for so long is gone, or stopped."""
VICTIM, DONE = "because of another process", "it was done"
"""Reasons to leave that are no trouble of one's own."""

_ANSWER_S = 10.0


@dataclasses.dataclass
class Sign:
    """What a process writes each second."""

    beat: int = 0
    host: str = ""
    doing: str = "its start"
    """What it has marked last."""
    since_s: float = 0.0
    """Seconds since then."""
    line: str = ""
    """Where the main thread is (`main_thread.Place`), once it has stood still for half the timeout."""
    collective: str | None = None
    """The collective it waits in, if it does; which one it is said from then on."""
    joined: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    """`main_thread.joined`, once it is late."""


def named(rank: int, sign: Sign) -> str:
    """The process and its machine."""
    return f"rank {rank} on {sign.host}" if sign.host else f"rank {rank}"


def described(rank: int, sign: Sign) -> str:
    """The process, its machine and what it was doing: half a sentence."""
    if not sign.beat and not sign.line:
        return named(rank, sign)
    where = sign.collective or sign.line
    return f"{named(rank, sign)} was in {sign.doing}" + (f", in {where}" if where else "")


def not_taking_part(signs: dict[int, Sign]) -> list[int]:
    """The ranks that the others wait for, of processes that are all alive and get no further.

    They are those whose main threads are in no collective while others are, the one without a mark for longest first.
    Where that tells nothing, as on GPUs: those that have joined fewer collectives of some group than its other ranks.
    """
    outside = [rank for rank, sign in signs.items() if sign.collective is None]
    if 0 < len(outside) < len(signs):
        return sorted(outside, key=lambda rank: -signs[rank].since_s)
    newest: dict[str, int] = {}
    for sign in signs.values():
        for group, (number, _) in sign.joined.items():
            newest[group] = max(number, newest.get(group, number))
    return [
        rank
        for rank, sign in signs.items()
        if any(number < newest[group] for group, (number, _) in sign.joined.items())
    ]


class Board:
    """The signs of all processes, through a connection to the store that nothing else waits on.

    Made by all processes together. Methods raise RuntimeError where the store is gone or does not answer within ten
    seconds.
    """

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        # A launcher may keep its store when it starts the processes again: what the earlier ones have left there, such
        # as that they have ended, must not be read.
        start = [uuid.uuid4().hex]
        dist.broadcast_object_list(start, src=0)
        self._prefix = f"titans_dist/{start[0]}"
        self._lock = threading.Lock()
        self._store = self._connect()

    def write(self, sign: Sign) -> None:
        """Show `sign`. A connection that was broken is made anew."""
        text = json.dumps(dataclasses.asdict(sign))
        with self._lock:
            try:
                self._store.set(self._key("sign", self.rank), text)
            except RuntimeError:
                self._store = self._connect()

    def signs(self, *ranks: int) -> dict[int, Sign]:
        """The signs of `ranks`, or of all; an empty one of a process that has not given any."""
        asked = list(ranks or range(self.world))
        keys = [self._key("sign", rank) for rank in asked]
        with self._lock:
            if self._store.check(keys):
                texts = [value.decode() for value in self._store.multi_get(keys)]
            else:
                texts = [self._store.get(key).decode() if self._store.check([key]) else "{}" for key in keys]
        return {rank: Sign(**json.loads(text)) for rank, text in zip(asked, texts, strict=True)}

    def leave(self, reason: str) -> None:
        """Tell the others why this process ends before them."""
        with self._lock:
            self._store.set(self._key("left", self.rank), " ".join(reason.split()))
            if reason != DONE:
                self._store.add(self._key("ends"), 1)

    def is_broken(self) -> bool:
        """Whether some process has left for a reason other than that it was done."""
        with self._lock:
            return self._store.add(self._key("ends"), 0) > 0

    def missing(self) -> tuple[list[int], dict[int, str]]:
        """The other ranks that are silent without a word, and the reasons of those that have left.

        Not among them: those that only were quicker to notice. Takes SILENCE_S.
        """
        before = self.signs()
        time.sleep(SILENCE_S)
        after, reasons = self.signs(), self._reasons()
        silent = [rank for rank in after if after[rank].beat == before[rank].beat and rank not in reasons]
        ended = {rank: reason for rank, reason in reasons.items() if reason != VICTIM}
        return [rank for rank in silent if rank != self.rank], ended

    def _reasons(self) -> dict[int, str]:
        keys = {rank: self._key("left", rank) for rank in range(self.world) if rank != self.rank}
        with self._lock:
            return {rank: self._store.get(key).decode() for rank, key in keys.items() if self._store.check([key])}

    def _key(self, *names: object) -> str:
        return "/".join(map(str, (self._prefix, *names)))

    @staticmethod
    def _connect() -> dist.TCPStore:
        address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ["MASTER_PORT"])
        limit = datetime.timedelta(seconds=_ANSWER_S)
        return dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=limit)
