"""The other processes of the job: whether they run the same software, and which of them is gone when one is.

Collectives only say that somebody's connection broke, or that nothing came. So every process shows a sign of life in
the job's store each second, from a thread of its own. One whose collective fails looks who has stopped to.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from types import TracebackType

import torch
import torch.distributed as dist

from titans_dist.config import UserError

BEAT_S = 1.0
SILENCE_S = 3.5
"""A process that has given no sign for so long is gone, or stopped."""

_BROKEN = re.compile(
    r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|[Tt]imed? ?out|[Bb]roken pipe|recvValue|sendBytes"
)
_VICTIM = "because of another process"
_KEY = "titans_dist/{}/{}"


class PeerError(UserError):
    """Another process of the job is gone, or does something else."""


@contextlib.contextmanager
def watched_peers() -> Iterator[None]:
    """For the block, be seen by the others; what breaks because of one of them becomes a PeerError that names it."""
    heart = _Heart()
    heart.start()
    try:
        yield
    except Exception as error:
        if isinstance(error, RuntimeError) and _BROKEN.search(str(error)):
            sentence = heart.diagnose(error)
            heart.linger()
            raise PeerError(sentence) from error
        heart.leave(f"{type(error).__name__}: {error}")
        raise
    finally:
        heart.stop()


def check_versions() -> None:
    """Raise UserError where the processes do not run the same versions of what they compute with. Collective."""
    everybody: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everybody, own_versions())
    for name in everybody[0]:
        found = [versions.get(name, "none") for versions in everybody]
        if len(set(found)) > 1:
            usual = max(set(found), key=lambda version: (found.count(version), version))
            other = next(rank for rank, version in enumerate(found) if version != usual)
            raise UserError(
                f"rank {other} runs {name} {found[other]} and rank {found.index(usual)} {usual}; "
                "install the same versions on all machines"
            )


def own_versions() -> dict[str, str]:
    """What has to be the same on all processes."""
    packages = ("titans-dist", "megatron-core", "deepspeed", "numpy")
    found = {"Python": platform.python_version(), "torch": torch.__version__}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


class _Heart:
    """Signs of life, through a connection to the store that nothing else waits on."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="signs-of-life", daemon=True)
        self._store: dist.TCPStore | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        # Where the meeting place is a file, as in tests, nobody can be seen.
        if "MASTER_PORT" in os.environ and self.world > 1:
            address = os.environ.get("MASTER_ADDR", "127.0.0.1")
            port = int(os.environ["MASTER_PORT"])
            self._store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
            self._sign()
            self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def leave(self, reason: str) -> None:
        """Tell the others why this process ends before them."""
        with contextlib.suppress(RuntimeError):
            if self._store is not None:
                self._store.set(_KEY.format("left", self.rank), " ".join(reason.split()))

    def diagnose(self, error: RuntimeError) -> str:
        """One sentence: who is gone, and what this process was doing."""
        doing = f"rank {self.rank} was in {last_collective(error.__traceback__)}"
        mend = "start the job again to go on from its last checkpoint"
        if self._store is None:
            return f"{doing}, which failed: {_first_line(error)}; {mend}"
        self.leave(_VICTIM)
        try:
            before = self._signs()
            time.sleep(SILENCE_S)
            after = self._signs()
            silent = [rank for rank in range(self.world) if after[rank] == before[rank] and rank != self.rank]
            reasons = {rank: self._reason(rank) for rank in silent}
        except RuntimeError:
            return f"rank 0, or the launcher that holds the job together, is gone; {doing}; {mend}"
        silent = [rank for rank in silent if reasons[rank] != _VICTIM]  # those only were quicker to notice
        for rank in silent:
            if reasons[rank] is not None:
                return f"rank {rank} ended ({reasons[rank]}); {doing}; {mend}"
        if silent:
            who = "rank " + ", ".join(map(str, silent))
            return f"{who} {'are' if len(silent) > 1 else 'is'} gone or stopped; {doing}; {mend}"
        return f"no process is gone, but one did not take part in time: {doing} ({_first_line(error)}); {mend}"

    def linger(self) -> None:
        """Keep the store up, where it is this process's, until the others have had time to look into it."""
        if self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            time.sleep(2 * SILENCE_S)

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT_S):
            try:
                self._sign()
            except RuntimeError:
                return  # the store is gone; the next collective will say so

    def _sign(self) -> None:
        assert self._store is not None
        with self._lock:
            self._store.add(_KEY.format("alive", self.rank), 1)

    def _signs(self) -> list[int]:
        assert self._store is not None
        with self._lock:
            return [self._store.add(_KEY.format("alive", rank), 0) for rank in range(self.world)]

    def _reason(self, rank: int) -> str | None:
        assert self._store is not None
        key = _KEY.format("left", rank)
        with self._lock:
            return self._store.get(key).decode() if self._store.check([key]) else None


def last_collective(trace: TracebackType | None) -> str:
    """What the last call of torch.distributed in a traceback was, and among which ranks.

    One that runs in the background fails where it is waited for: then that place is named.
    """
    found, inside = "a message between processes", False
    while trace is not None:
        code, names = trace.tb_frame.f_code, trace.tb_frame.f_locals
        is_call = code.co_filename.endswith("distributed_c10d.py") and not code.co_name.startswith("_")
        if is_call and code.co_name not in ("wait", "wrapper") and not inside:  # what it calls itself says less
            inside = True
            group = names.get("group")
            members = dist.get_process_group_ranks(group) if isinstance(group, dist.ProcessGroup) else None
            among = "all ranks" if members is None else "ranks " + ", ".join(map(str, members))
            found = f"{code.co_name} among {among}"
        elif "/megatron/" in code.co_filename or "/titans_dist/" in code.co_filename:
            inside = False
            found = f"{code.co_name}, waiting for a collective"
        trace = trace.tb_next
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
