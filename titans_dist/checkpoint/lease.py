"""Who may write the checkpoints of a run: one start of one job at a time.

``lease.json`` beside the checkpoints names the start that holds them: its incarnation (8 random hexadecimal digits),
its job and how often that was restarted, its host and process. While it lives it raises a counter in
``lease.<incarnation>.beat`` every few seconds. Another start takes the lease over

* at once, when it is a later restart of the same job: the scheduler has given the older one up, though it may live on
  for a while on a node that lost its network;
* when the holder is dead: its process is gone or, on another machine, its counter stands still for a few beats.

Any other is refused. The older start learns of a takeover at its next commit, which fails. Nothing is locked, since
locks of network file systems outlive their owners: each writes the whole file and reads what became of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from titans_dist.config.errors import CheckpointError

LEASE = "lease.json"
BEAT_S = 3.0
"""Seconds between two beats."""
SILENT_BEATS = 5
"""A holder on another machine that has not raised its counter for so long is dead."""
SETTLE_S = 0.5
"""After so long whoever wrote the lease at the same moment has written it."""

_ATTEMPTS = 5
_CLOCK_ERROR_S = 2.0
_RESTARTS = ("SLURM_RESTART_COUNT", "JOBSET_RESTART_ATTEMPT", "TORCHELASTIC_RESTART_COUNT")


class FencedError(CheckpointError):
    """Another start of the run has taken over, and this one may not write any more."""


@dataclasses.dataclass(frozen=True)
class Owner:
    """One start of a job."""

    incarnation: str
    job: str
    restarts: tuple[int, ...]
    """By the scheduler, and within the job."""
    host: str
    processes: str
    """The namespace that `pid` is a number of; that of another container on the same host means nothing here."""
    pid: int
    started: float
    """When the process began, by its host's clock: a later process may have the same number."""

    @classmethod
    def this_process(cls) -> Owner:
        """A new incarnation."""
        pid, incarnation = os.getpid(), secrets.token_hex(4)
        restarts = tuple(int(os.environ.get(name, "0")) for name in _RESTARTS)
        started = psutil.Process(pid).create_time()
        return cls(incarnation, _job() or incarnation, restarts, socket.gethostname(), _namespace(), pid, started)

    def follows(self, other: Owner) -> bool:
        """Whether this is a later restart of the same job."""
        return self.job == other.job and self.restarts > other.restarts

    def is_of_this_machine(self) -> bool:
        """Whether `pid` can be looked up."""
        return self.host == socket.gethostname() and self.processes == _namespace()

    def is_running(self) -> bool:
        """Whether the process of this machine is alive."""
        try:
            process = psutil.Process(self.pid)
            is_same = abs(process.create_time() - self.started) < _CLOCK_ERROR_S
            return is_same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (job {self.job})"


class Lease:
    """The right of this process to write below one folder; see `acquire`."""

    def __init__(self, root: Path, owner: Owner) -> None:
        self.root, self.owner = root, owner
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="lease", daemon=True)

    @classmethod
    def acquire(cls, root: Path) -> Lease:
        """Take the lease of the checkpoints below `root`, a folder that is made; in one process of a job.

        Raises CheckpointError naming the holder when that lives and is not an earlier start of this job. To find out
        takes up to SILENT_BEATS beats where the holder is on another machine.
        """
        root.mkdir(parents=True, exist_ok=True)
        lease = cls(root, Owner.this_process())
        for _ in range(_ATTEMPTS):
            holder = _read(root)
            if holder is not None and not lease.owner.follows(holder) and not _is_dead(root, holder):
                raise _held(root, holder)
            lease._claim()
            time.sleep(SETTLE_S)
            if _read(root) == lease.owner:
                if holder is not None:
                    _beat_file(root, holder).unlink(missing_ok=True)
                lease._beat(0)
                lease._thread.start()
                return lease
        raise CheckpointError(f"several starts of this run reach for {root / LEASE} at the same time: start only one")

    @property
    def incarnation(self) -> str:
        """8 hexadecimal digits that no other start has."""
        return self.owner.incarnation

    def check(self) -> None:
        """Raise FencedError when another start has taken over. A lease that somebody deleted is written again."""
        holder = _read(self.root)
        if holder is None:
            self._claim()
        elif holder != self.owner:
            raise FencedError(f"{holder} has taken this run over from {self.owner} and writes {self.root} now")

    def release(self) -> None:
        """Let others have it at once."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(OSError):
            _beat_file(self.root, self.owner).unlink(missing_ok=True)
            if _read(self.root) == self.owner:
                (self.root / LEASE).unlink(missing_ok=True)

    def _claim(self) -> None:
        temporary = self.root / f"lease.{self.incarnation}.tmp"
        temporary.write_text(json.dumps(dataclasses.asdict(self.owner), indent=1), encoding="utf-8")
        temporary.replace(self.root / LEASE)

    def _beat_on(self) -> None:
        count = 0
        while not self._stopped.wait(BEAT_S):
            count += 1
            with contextlib.suppress(OSError, CheckpointError):  # a full disk is no reason to seem dead for ever
                if _read(self.root) not in (self.owner, None):
                    _beat_file(self.root, self.owner).unlink(missing_ok=True)
                    return
                self._beat(count)

    def _beat(self, count: int) -> None:
        """Written in place: clients of a network file system see that sooner than a new file of the same name."""
        descriptor = os.open(_beat_file(self.root, self.owner), os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(descriptor, f"{count:012d}\n".encode(), 0)
        finally:
            os.close(descriptor)


def check_free(root: Path) -> None:
    """Raise what `acquire` would raise in a new job, which takes as long; nothing is taken or changed."""
    holder = _read(root)
    if holder is not None and not _is_dead(root, holder):
        raise _held(root, holder)


def _held(root: Path, holder: Owner) -> CheckpointError:
    return CheckpointError(f"{holder} is training this run and writes {root}: stop it, or give this run another name")


def _job() -> str | None:
    """What the starts of one job have in common, as far as a scheduler or torchrun names it."""
    if "SLURM_JOB_ID" in os.environ:
        return f"slurm {os.environ['SLURM_JOB_ID']}"
    if "JOBSET_NAME" in os.environ:
        return f"jobset {os.environ['JOBSET_NAME']}"
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # "none" is what torchrun calls a job without a name
    return None if run == "none" else f"torchrun {run}"


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _read(root: Path) -> Owner | None:
    """Who holds the lease; raises CheckpointError where that cannot be read."""
    try:
        text = (root / LEASE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        stored: dict[str, Any] = json.loads(text)
        return Owner(**{**stored, "restarts": tuple(stored["restarts"])})
    except (ValueError, TypeError, KeyError):
        raise CheckpointError(
            f"{root / LEASE} does not say who writes there: delete it if nobody trains this run"
        ) from None


def _is_dead(root: Path, holder: Owner) -> bool:
    """Whether the holder is gone; of one on another machine that is known after a few beats."""
    if holder.is_of_this_machine():
        return not holder.is_running()
    before = _beats(root, holder)
    for _ in range(SILENT_BEATS):
        time.sleep(BEAT_S)
        if _beats(root, holder) != before:
            return False
    return True


def _beats(root: Path, owner: Owner) -> bytes:
    try:
        return _beat_file(root, owner).read_bytes()
    except OSError:
        return b""


def _beat_file(root: Path, owner: Owner) -> Path:
    return root / f"lease.{owner.incarnation}.beat"
