"""A driver and a pool of Ray actors that measure pieces of work.

Each copy of the model is one actor, or with evaluation.tensor > 1 a group of them on one node, and has one piece at a
time. What an actor hands back between two legs of a long piece stays in Ray's object store, and the next copy that is
free takes it from there. A copy that has died is made again and its piece goes on from its last leg.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from titans_dist.config import Config, UserError
from titans_dist.evaluation.work import Piece, Result

OBJECT_STORE_BYTES = 256 << 20
"""Of a Ray of our own: states of documents, one for each copy."""
PROBE_S = 10.0
LOOK_S = 1.0
"""Seconds between two lines of progress at least, and between two looks at those who work."""


@dataclasses.dataclass
class Task:
    """A piece on its way."""

    piece: Piece
    progress: Any = None
    """Reference to its `Progress`; None at its start."""
    failures: int = 0


@dataclasses.dataclass
class Copy:
    """The processes of one copy of the model."""

    actors: list[Any]
    group: Any
    task: Task | None = None
    waits_for: list[Any] = dataclasses.field(default_factory=list)
    """References: of each actor whether it is ready, or whether the piece is done."""
    values: list[Any] = dataclasses.field(default_factory=list)
    """References to what each actor has made of its piece."""


class Pool:
    """The copies, and the work that waits for them."""

    def __init__(self, config: Config, step: int) -> None:
        """Join or start Ray. Raises UserError where it cannot be reached or lacks what the workers need."""
        self.config, self.step = config, step
        self.ray = connect(config)
        self.copies: list[Copy] = []
        self.failed: list[str] = []
        self._deaths_at_start = 0

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        for copy in self.copies:
            self._end(copy)
        self.ray.shutdown()

    def measure(self, pieces: list[Piece], add: Callable[[Piece, Result], object], say: Callable[[str], None]) -> None:
        """Measure all pieces; `add` gets each result at once. Raises UserError for those that cannot be measured."""
        waiting = deque(Task(piece) for piece in pieces)
        meter = _Meter(pieces, say)
        for _ in range(min(self.config.evaluation.workers, len(waiting))):
            self.copies.append(self._begin())
        while waiting or any(copy.task for copy in self.copies):
            first = {copy.waits_for[0]: copy for copy in self.copies if copy.waits_for}
            ready, _ = self.ray.wait(list(first), timeout=LOOK_S)
            for reference in ready:
                self._heed(first[reference], waiting, add, meter)
            for copy in self.copies:
                if not copy.waits_for and waiting:
                    self._give(copy, waiting.popleft())
            meter.show()
        if self.failed:
            more = f", and {len(self.failed) - 1} more" if len(self.failed) > 1 else ""
            raise UserError(f"{self.failed[0]}{more}; everything else is measured and in the ledger")

    def _begin(self) -> Copy:
        """Ask for the processes of one copy; they load the checkpoint meanwhile."""
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from titans_dist.evaluation.actor import Process

        settings = self.config.evaluation
        needs = {"CPU": settings.cpus, **({"GPU": settings.gpus} if settings.gpus else {})}
        group = placement_group([needs] * settings.tensor, strategy="STRICT_PACK")
        actor = self.ray.remote(Process)
        actors = [
            actor.options(
                num_cpus=settings.cpus,
                num_gpus=settings.gpus,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
            ).remote(self.config, self.step, rank)
            for rank in range(settings.tensor)
        ]
        place = actors[0].place.remote()
        return Copy(actors, group, waits_for=[actor.join.remote(place) for actor in actors])

    def _give(self, copy: Copy, task: Task) -> None:
        copy.task, copy.waits_for, copy.values = task, [], []
        for rank, actor in enumerate(copy.actors):
            progress = None if task.progress is None else task.progress[rank]
            is_done, value = actor.advance.options(num_returns=2).remote(task.piece, progress)
            copy.waits_for.append(is_done)
            copy.values.append(value)

    def _heed(self, copy: Copy, waiting: deque[Task], add: Callable[[Piece, Result], object], meter: _Meter) -> None:
        """What has come back from a copy: a result, a leg, or the news of its death."""
        from ray.exceptions import RayError, RayTaskError

        task = copy.task
        try:
            done = self.ray.get(copy.waits_for)  # of a copy that has just begun, the names of its machines
            result = self.ray.get(copy.values[0]) if task is not None and all(done) else None
        except RayTaskError as error:  # the code has raised something, and would do so again
            if task is None:
                raise UserError(f"a worker cannot begin: {cause(error)}") from None
            self.failed.append(f"{task.piece} cannot be measured: {cause(error)}")
            copy.task, copy.waits_for = None, []
            if len(copy.actors) > 1:
                self._replace(copy)
            return
        except RayError as error:
            self._died(copy, waiting, error, meter)
            return
        copy.task, copy.waits_for = None, []
        if task is None:
            where = ", ".join(dict.fromkeys(done))
            meter.say(f"worker {self.copies.index(copy) + 1} of {len(self.copies)} is ready on {where}")
            return
        if result is None:
            task.progress = copy.values
            waiting.appendleft(task)
            return
        add(task.piece, result)
        meter.done(task.piece, result)

    def _died(self, copy: Copy, waiting: deque[Task], error: Exception, meter: _Meter) -> None:
        """Begin another copy, and put its piece back, unless it has failed too often."""
        task = copy.task
        sentence = " ".join(str(error).split())[:300]
        if task is not None:
            from ray.exceptions import ObjectLostError

            task.failures += 1
            if isinstance(error, ObjectLostError):
                task.progress = None  # it went down with its node
            if task.failures > self.config.evaluation.retries:
                self.failed.append(f"{task.piece} has lost {task.failures} workers ({sentence})")
            else:
                meter.say(f"{task.piece}: its worker has died ({sentence}); trying again")
                waiting.appendleft(task)
        else:
            self._deaths_at_start += 1
            if self._deaths_at_start > self.config.evaluation.retries:
                raise UserError(f"workers die before they begin: {sentence}")
        self._replace(copy)

    def _replace(self, copy: Copy) -> None:
        self._end(copy)
        self.copies[self.copies.index(copy)] = self._begin()

    def _end(self, copy: Copy) -> None:
        from ray.util.placement_group import remove_placement_group

        for actor in copy.actors:
            self.ray.kill(actor)
        remove_placement_group(copy.group)


def connect(config: Config) -> Any:
    """The module ray, connected. Raises UserError where that fails or Ray lacks what the workers need."""
    # An error comes with each of a call's two values, of which only the first is looked at.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    try:
        import ray
    except ImportError:
        raise UserError("evaluation.tasks needs Ray; install titans-dist[ray]") from None
    settings = config.evaluation
    address = settings.address or os.environ.get("RAY_ADDRESS")
    processes = settings.workers * settings.tensor
    own: dict[str, Any] = {
        "num_cpus": max(1, round(processes * settings.cpus + 0.5)),
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        _probe(address)
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}},
            **({} if address else own),
        )
    except (ConnectionError, OSError, ValueError, RuntimeError, TimeoutError) as error:
        where = f"at {address} " if address else ""
        raise UserError(f"Ray {where}cannot be reached ({' '.join(str(error).split())[:200]})") from None
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own would end the process as if something had failed
    there = ray.cluster_resources()
    for name, wanted in (("CPU", settings.cpus), ("GPU", settings.gpus)):
        if wanted * settings.tensor > there.get(name, 0):
            ray.shutdown()
            raise UserError(
                f"Ray has {there.get(name, 0):g} {name}s, and one worker needs {wanted * settings.tensor:g}; use fewer "
                f"evaluation.{name.lower()}s or a larger cluster"
            )
    return ray


def _probe(address: str | None) -> None:
    """Raise OSError where nobody listens at HOST:PORT: Ray itself would try for minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), PROBE_S).close()


def cause(error: BaseException) -> str:
    """One sentence out of an error that an actor has raised."""
    inner = getattr(error, "cause", None) or error
    text = " ".join(str(inner).split()) or type(inner).__name__
    return text if isinstance(inner, UserError) else f"{type(inner).__name__}: {text[-300:]}"


class _Meter:
    """Progress, with the tokens that were read and the time that is left."""

    def __init__(self, pieces: list[Piece], say: Callable[[str], None]) -> None:
        self.say = say
        self._total = sum(piece.tokens for piece in pieces)
        self._count, self._pieces, self._tokens, self._read = 0, len(pieces), 0, 0
        self._began, self._shown = time.monotonic(), 0

    def done(self, piece: Piece, result: Result) -> None:
        self._count += 1
        self._tokens += piece.tokens
        self._read += result.tokens

    def show(self) -> None:
        if self._count == self._shown:
            return
        self._shown = self._count
        spent = time.monotonic() - self._began
        left = spent / self._tokens * (self._total - self._tokens)
        self.say(f"{self._count} of {self._pieces} pieces | {self._read:,} tokens | eta {left:,.0f} s")
