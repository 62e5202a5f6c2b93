"""The other processes of the job: whether they run the same software, and which of them is gone, stuck or late.

Collectives only say that somebody's connection broke, or that nothing came. So every process shows in the job's store
each second that it lives, what it does (`mark`) and where its main thread is. One whose collective fails looks who has
stopped to, else who has not joined. One that itself makes no progress is ended (`watch`).
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from titans_dist.config import UserError
from titans_dist.parallel import main_thread
from titans_dist.parallel.signs import DONE, SILENCE_S, VICTIM, Board, Sign, described, named, not_taking_part
from titans_dist.parallel.waiting import is_waiting
from titans_dist.parallel.watch import BEAT_S, Watch, end_process

_SILENT_S = 60.0
"""A process that has given no sign for so long will not come back, even if it only was slow."""
_ANSWER_S = 4 * SILENCE_S
_TIMED_OUT = re.compile(r"[Tt]imed? ?out")
_BROKEN = re.compile(
    rf"gloo|NCCL|[Cc]onnection (closed|reset|refused)|{_TIMED_OUT.pattern}|[Bb]roken pipe|recvValue|sendBytes"
)
_MEND = "start the job again to go on from its last checkpoint"


class PeerError(UserError):
    """Another process of the job is gone, or does something else."""


def say_on_stderr(code: int, text: str) -> object:
    """Print `text`; `code` is what the process will exit with."""
    return print(text, file=sys.stderr, flush=True)


last_words: Callable[[int, str], object] = say_on_stderr
"""How a process that ends itself says why. A launcher to which its workers report sets its own."""


def mark(doing: str) -> None:
    """Say what this process does from now on ("step 12"): a sign of progress. Nothing outside of `watched_peers`."""
    if _heart is not None:
        _heart.mark(doing)


@contextlib.contextmanager
def busy(doing: str) -> Iterator[None]:
    """For the block, work on something that may take longer than any timeout (a compilation, a whole evaluation).

    The watch waits. Collectives that others wait in meanwhile keep their timeouts.
    """
    heart = _heart
    if heart is None:
        yield
        return
    before = heart.sign.doing
    heart.watch.busy += 1
    heart.mark(doing)
    try:
        yield
    finally:
        heart.mark(before)
        heart.watch.busy -= 1


@contextlib.contextmanager
def watched_peers(run_dir: Path | None = None, timeout_s: float = 600) -> Iterator[None]:
    """For the block, be seen by the others; what breaks because of one of them becomes a PeerError that names it.

    A process that makes no progress for `timeout_s` ends with exit code 1 (see `watch`). It, and one with a PeerError,
    leaves its stacks and its last collectives in `run_dir`/logs: stacks-rank{r}.txt and flight-rank{r}.json.
    """
    global _heart
    heart = _heart = _Heart(run_dir, timeout_s)
    try:
        heart.start()
        yield
        heart.leave(DONE)
    except Exception as error:
        if isinstance(error, RuntimeError) and _BROKEN.search(str(error)):
            sentence = heart.diagnose(error)
            heart.linger()
            raise PeerError(sentence) from error
        heart.leave(f"{type(error).__name__}: {error}")
        raise
    finally:
        _heart = None
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


_Answer = TypeVar("_Answer")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


class _Heart:
    """This process as the others see it, and what it finds out about them."""

    def __init__(self, run_dir: Path | None, timeout_s: float) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.run_dir = run_dir
        self.watch = Watch(timeout_s, self._give_up)
        self.sign = Sign(host=socket.gethostname())
        self._marked = time.monotonic()
        self._is_failing = False
        self._stopped = threading.Event()
        self._board: Board | None = None
        self._thread = threading.Thread(target=self._beat, name="signs-of-life", daemon=True)

    def start(self) -> None:
        if self.world == 1:
            return
        # Where the meeting place is a file, as in tests, nobody can be seen.
        if "MASTER_PORT" in os.environ:
            self._board = Board(self.rank, self.world)
            self._write()
            self._thread.start()
        self.watch.start()

    def stop(self) -> None:
        self.watch.stop()
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(2 * BEAT_S)  # not for ever: the store may not answer

    def mark(self, doing: str) -> None:
        self.sign.doing = doing
        self._marked = time.monotonic()
        self.watch.marks += 1

    def leave(self, reason: str) -> None:
        """Tell the others why this process ends before them."""
        self._ask(lambda board: board.leave(reason))

    def diagnose(self, error: RuntimeError) -> str:
        """One sentence: who is gone or has not taken part, and what this process was doing."""
        self.watch.is_off = self._is_failing = True
        self.sign.collective = main_thread.last_collective(error.__traceback__)
        doing = f"rank {self.rank} was in {self.sign.collective}"
        if self._board is None:
            sentence = f"{doing}, which failed: {_first_line(error)}; {_MEND}"
        else:
            self.leave(VICTIM)
            found = self._ask(lambda board: self._culprit(board, bool(_TIMED_OUT.search(str(error)))))
            if found is None:
                sentence = f"rank 0, or the launcher that holds the job together, is gone; {doing}; {_MEND}"
            elif found:
                sentence = f"{found}; {doing}; {_MEND}"
            else:
                first = _first_line(error)
                sentence = f"no process is gone, but one did not take part in time: {doing} ({first}); {_MEND}"
        self._leave_traces(sentence, error)
        return sentence

    def linger(self) -> None:
        """Keep the store up, where it is this process's, until the others have had time to look into it."""
        if self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            time.sleep(2 * SILENCE_S)

    def _culprit(self, board: Board, is_late: bool) -> str:
        """Which other process is to blame, in half a sentence; empty where none is, or this one."""
        gone, ended = board.missing()
        signs = board.signs() | {self.rank: self.sign}
        for rank, reason in ended.items():
            return f"{named(rank, signs[rank])} ended ({reason})"
        if gone:
            who = ", ".join(named(rank, signs[rank]) for rank in gone)
            return f"{who} {'are' if len(gone) > 1 else 'is'} gone or stopped"
        late = not_taking_part(signs) if is_late else []
        if not late or late[0] == self.rank:
            return ""
        more = f" (and {len(late) - 1} more ranks)" if len(late) > 1 else ""
        return f"{described(late[0], signs[late[0]])}{more}, and did not take part in time"

    def _give_up(self, still_s: float) -> None:
        """Say why this process ends without being asked, on the watch's thread, and end it; unless it moves again."""
        self._write(is_still=True)
        self._is_failing = True
        found = self._ask(lambda board: self._culprit(board, is_late=True))
        if self.watch.has_moved():
            self._is_failing = False
            return
        own = f"{described(self.rank, self.sign)}, without progress for {still_s:.0f} s"
        self.leave(VICTIM if found else own)
        sentence = f"{found}; {own}; {_MEND}" if found else f"{own}; {_MEND}"
        self._leave_traces(sentence)
        last_words(1, f"titans-dist: {sentence}")
        end_process(1)

    def _leave_traces(self, sentence: str, error: BaseException | None = None) -> None:
        """Leave stacks and last collectives in the run folder; whatever goes wrong there, the sentence is said."""
        if self.run_dir is not None:
            with contextlib.suppress(Exception):
                main_thread.write_stacks(self.run_dir / "logs" / f"stacks-rank{self.rank}.txt", sentence, error)
            with contextlib.suppress(Exception):
                main_thread.write_flight(self.run_dir / "logs" / f"flight-rank{self.rank}.json")

    def _ask(self, question: Callable[[Board], _Answer]) -> _Answer | None:
        """The answer to a question to the others; None where the store is gone or does not answer."""
        board, answers = self._board, []
        if board is None:
            return None

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                answers.append(question(board))

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(_ANSWER_S)
        return answers[0] if answers else None

    def _beat(self) -> None:
        next_rank, heard, heard_at = (self.rank + 1) % self.world, 0, time.monotonic()
        board = self._board
        assert board is not None
        while not self._stopped.wait(BEAT_S):
            with contextlib.suppress(RuntimeError):  # where the store is gone, the next collective will say so
                self._write()
                if self.watch.still_s < SILENCE_S:
                    heard_at = time.monotonic()
                    continue
                # Each looks after one other: all of them together would ask too much of one store.
                beat = board.signs(next_rank)[next_rank].beat
                if beat != heard:
                    heard, heard_at = beat, time.monotonic()
                is_silent = time.monotonic() - heard_at > _SILENT_S
                self.watch.is_broken = is_silent or board.is_broken()

    def _write(self, is_still: bool = False) -> None:
        """Show this process to the others; `is_still`: it stands still, and it is safe to look where."""
        sign = self.sign
        sign.beat += 1
        sign.since_s = round(time.monotonic() - self._marked, 1)
        if not self._is_failing:  # then what it was doing when it failed is what counts
            if is_still or self.watch.still_s > self.watch.timeout_s / 2:
                sign.line, sign.collective = main_thread.place()
                sign.joined = sign.joined or main_thread.joined()
            else:
                sign.line, sign.collective, sign.joined = "", "a collective" if is_waiting() else None, {}
        if self._board is not None:
            self._board.write(sign)


_heart: _Heart | None = None
