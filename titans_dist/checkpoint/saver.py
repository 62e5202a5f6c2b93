"""Saving while training goes on.

Training waits for one thing: that its state is copied to host memory (``host``). The rest is done by a thread on each
rank: planning, writing, hashing, the commit, pruning, the mirror. The threads agree over a process group of their own,
since training uses the others at the same time. A failure on any rank is one sentence on all; what may pass is tried
again from the same copy, and nothing but the caller decides whether training ends for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from titans_dist.checkpoint.agreement import AgreedFailure, Agreement, outcome
from titans_dist.checkpoint.host import HostBuffers, HostCopy, frozen_json
from titans_dist.checkpoint.lease import FencedError
from titans_dist.checkpoint.mirror import upload
from titans_dist.checkpoint.staleness import digests, stale
from titans_dist.checkpoint.store import Store
from titans_dist.checkpoint.writing import Plan
from titans_dist.config.run import CheckpointConfig

PAUSE_S = 1.0
"""Before a save is tried again; each further pause is four times as long."""
LEAVE_S = 60.0
"""How long `close` waits for a save that nobody waited for."""


@dataclasses.dataclass(frozen=True)
class SaveResult:
    """How a save ended, the same on every rank."""

    step: int
    seconds: float
    """From the end of the copy until the checkpoint was committed, or given up."""
    stall_seconds: float
    """For which training waited."""
    bytes: int
    """Size of all files; 0 after a failure."""
    attempts: int
    error: str | None
    """None, or one sentence: nothing was committed."""
    is_fenced: bool = False
    """Whether that is so because another start of the run has taken over: no later save can succeed."""
    prune_error: str | None = None
    """Why an old checkpoint could not be removed, though this one is committed."""
    mirror_error: str | None = None
    """Why it could not be copied to `checkpoint.mirror`, though it is committed here."""


@dataclasses.dataclass
class _Job:
    step: int
    permanent: bool
    copied: Callable[[], tuple[HostCopy, dict[str, Any]]]
    """The copy and the meta; raises what was raised while they were made."""
    stall_seconds: float
    attempts: int = 0

    def failed(self, error: str, began: float, is_fenced: bool = False) -> SaveResult:
        error = f"cannot save step {self.step}: {error}"
        return SaveResult(self.step, time.monotonic() - began, self.stall_seconds, 0, self.attempts, error, is_fenced)


class Saver:
    """Writes the checkpoints of a store, one at a time."""

    def __init__(self, store: Store, settings: CheckpointConfig, timeout_s: float = 600) -> None:
        """The constructor and the methods that say so are collective: all ranks of the default group call them.

        `timeout_s`: how long a rank's thread waits for another that does not answer.
        """
        self.store, self.settings = store, settings
        self._group: dist.ProcessGroup | None = dist.new_group(
            backend="gloo", timeout=datetime.timedelta(seconds=timeout_s)
        )
        self._ranks = Agreement(self._group)
        self._buffers = HostBuffers()
        self._thread: threading.Thread | None = None
        self._result: SaveResult | None = None
        self._is_lost = False

    @property
    def busy(self) -> bool:
        """Whether a save is under way here, or has ended and nobody has asked how; none can be started then."""
        return self._thread is not None or self._result is not None

    def start(
        self,
        step: int,
        sharded_state: dict[str, Any],
        meta: dict[str, Any],
        permanent: bool = False,
        private: tuple[str, ...] = (),
    ) -> None:
        """Save a state, which may change as soon as this returns; collective.

        `sharded_state` holds ShardedTensors, JSON-like values (those of rank 0 are stored) and
        LocalNonpersistentObjects (not stored); `meta` is JSON for `store.meta`. Tensors in host memory whose keys begin
        with one of `private` are copies already that nobody will change: they are written as they are.

        A failure on any rank raises nothing: all learn of it by `finished` or `wait`, earlier checkpoints stay, and a
        later save may succeed.
        """
        if self.busy:
            raise RuntimeError("a save is under way or nobody has asked how it ended: wait() first")
        began = time.monotonic()
        # What fails here is told when all meet.
        copied = outcome(lambda: (self._buffers.copy(sharded_state, self._ranks.rank == 0, private), frozen_json(meta)))
        job = _Job(step, permanent, copied, time.monotonic() - began)
        if not self.settings.asynchronous:
            self._run(job)
            return
        self._thread = threading.Thread(target=self._run, args=(job,), name=f"save-{step}", daemon=True)
        self._thread.start()

    def finished(self) -> SaveResult | None:
        """How the save ended that was under way, or None while it goes on; each is told once. Does not wait."""
        return None if self._thread is not None and self._thread.is_alive() else self._told()

    def wait(self) -> SaveResult | None:
        """`finished`, once the save under way has ended; None where there was none. Collective."""
        if self._thread is not None:
            self._thread.join()
        return self._told()

    def close(self) -> None:
        """Let go of memory and the process group; a save that goes on is given some time."""
        if self._thread is not None:
            self._thread.join(LEAVE_S)
            if self._thread.is_alive():
                return  # it reads the buffers; the process may end without it
        self._buffers.release()
        if self._group is not None:
            with contextlib.suppress(ValueError, RuntimeError):  # the groups of the whole job may be gone already
                dist.destroy_process_group(self._group)
            self._group = None

    def _told(self) -> SaveResult | None:
        self._thread = None
        result, self._result = self._result, None
        return result

    def _run(self, job: _Job) -> None:
        """The save, from the copy on."""
        began = time.monotonic()
        try:
            if self._is_lost:
                raise RuntimeError("one did not answer during an earlier save")
            result = self._saved(job, began)
            self._result = self._ranks.on_rank_0(lambda: result)
        except BaseException as error:  # a collective has failed, and the others cannot be told
            self._is_lost = True
            self._result = job.failed(f"rank {self._ranks.rank} has lost the other ranks: {_shown(error)}", began)

    def _saved(self, job: _Job, began: float) -> SaveResult:
        ranks, step, address = self._ranks, job.step, self.settings.mirror
        try:
            copy, meta = ranks.agreed(job.copied)
            plan = Plan(ranks, copy)
            found = self._fresh_digests(step, copy, meta)
            size_bytes = self._written(job, plan, meta, found)
        except AgreedFailure as failure:
            return job.failed(str(failure), began, is_fenced=failure.kind == FencedError.__name__)
        seconds = time.monotonic() - began
        prune_error = self._problem(lambda: self.store.prune(self.settings.keep))
        mirror_error = None if address is None else self._problem(lambda: upload(self.store, step, address))
        return SaveResult(
            step, seconds, job.stall_seconds, size_bytes, job.attempts, None, False, prune_error, mirror_error
        )

    def _fresh_digests(self, step: int, copy: HostCopy, meta: dict[str, Any]) -> dict[str, str]:
        """Those of all ranks, on rank 0; raises AgreedFailure where nothing has changed since the checkpoint before."""
        ranks = self._ranks
        found: dict[str, str] = {}
        for own in ranks.gathered(ranks.patiently(lambda: digests(ranks.rank, copy))):
            found |= own

        def compare() -> str | None:
            earlier = [saved for saved in self.store.committed() if saved < step]
            before = self.store.manifest(earlier[-1]) if earlier else None
            return stale(found, meta, copy.numbers["lr"], before)

        if problem := ranks.on_rank_0(compare):
            raise AgreedFailure(problem, "stale")
        return found

    def _written(self, job: _Job, plan: Plan, meta: dict[str, Any], found: dict[str, str]) -> int:
        """Write and commit, more than once if need be; the size of all files on rank 0."""
        while True:
            job.attempts += 1
            try:
                return self._written_once(job, plan, meta, found)
            except AgreedFailure:
                self._ranks.on_rank_0(self.store.check_lease)  # a start that takes over removes what is half written
                if job.attempts > self.settings.retries:
                    raise
                time.sleep(PAUSE_S * 4 ** (job.attempts - 1))

    def _written_once(self, job: _Job, plan: Plan, meta: dict[str, Any], found: dict[str, str]) -> int:
        store, step = self.store, job.step
        try:
            folder = Path(self._ranks.on_rank_0(lambda: str(store.begin(step))))
            files = plan.write(folder)

            def commit() -> None:
                store.commit(step, meta, permanent=job.permanent, digests=found, files=files)

            self._ranks.on_rank_0(commit)
            return sum(entry["size"] for entry in files.values())
        except AgreedFailure:
            if self._ranks.rank == 0:  # all have stopped writing; what cannot be removed is a leftover
                with contextlib.suppress(OSError):
                    store.abort(step)
            raise

    def _problem(self, work: Callable[[], Any]) -> str | None:
        """Why rank 0 cannot do what may fail without harm."""
        try:
            self._ranks.patiently(lambda: work() if self._ranks.rank == 0 else None)
        except AgreedFailure as failure:
            return str(failure).removeprefix("rank 0: ")
        return None


def _shown(error: BaseException) -> str:
    """A line for the failure of a collective, without gloo's source line and advice."""
    return re.sub(r"^\[[^]]*\] *", "", str(error)).split(". ")[0].strip() or type(error).__name__
