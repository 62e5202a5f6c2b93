"""What the main thread of this process is doing, as another of its threads sees it; and what a hang leaves to read.

A thread that hangs cannot say so itself. But Python shows every thread the frames of all others, and from them can be
told whether the main thread is inside a collective, in which, and at which line of whose code it is. What cannot be
seen is the GPU: a main thread that waits for a kernel, the NCCL kernel of a collective too, is at the line of the
`.item()` or the `synchronize()` that waits. There `joined` says more, and so does the flight recorder.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import linecache
import os
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

_SHOWN_RANKS = 8
_STDLIB = sysconfig.get_path("stdlib")


class Place(NamedTuple):
    """Where a thread is."""

    line: str
    """Function, file and line of the innermost frame that is no library's."""
    collective: str | None
    """The call of torch.distributed that it is in, and among which ranks; None where it is in none."""


def place() -> Place:
    """Where the main thread is now. For another thread to ask, of one that seems to stand still.

    Of one that runs, Python 3.11 may crash over it, rarely: frames that come and go meanwhile are not safe to read.
    """
    frame = _main_frame()
    return Place(_line(frame), _collective(frame))


def is_unwinding() -> bool:
    """Whether the main thread is handling an exception, and so on its way out."""
    handled: Any = sys._current_exceptions().get(threading.main_thread().ident)  # type: ignore[arg-type]
    return handled not in (None, (None, None, None))  # a triple before Python 3.12


def completed() -> int:
    """How many collectives of this process are over, as torch's flight recorder counts them; 0 where it is off."""
    status = _flight(includeCollectives=False).get("pg_status", {})
    return sum(int(group["last_completed_collective"]) for group in status.values())


def joined() -> dict[str, tuple[int, str]]:
    """Of every group that this process has used of late: the number of its last collective, and what that was.

    Ranks of one group have the same numbers: one that is behind has not joined what the others wait in. With NCCL
    this holds where no main thread is inside a collective.
    """
    found: dict[str, tuple[int, str]] = {}
    for entry in _flight().get("entries", []):
        if not entry["is_p2p"]:
            found[entry["process_group"][0]] = (entry["collective_seq_id"], entry["profiling_name"].split(":")[-1])
    return found


def write_stacks(path: Path, title: str, error: BaseException | None = None) -> None:
    """Write `title`, the traceback of `error` and the stacks of all threads to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        file.write(f"{title}\nprocess {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n\n")
        if error is not None:
            file.write("".join(traceback.format_exception(error)) + "\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)


def write_flight(path: Path) -> bool:
    """Write torch's flight recorder to `path`; whether there was anything to write.

    It holds this process's last 2000 collectives (TORCH_FR_BUFFER_SIZE) with their groups, numbers and sizes: those of
    NCCL with what became of them, of gloo with `retired` false for one that is not over. Messages between two
    processes are in it with NCCL alone.
    """
    flight = _flight()
    if not flight.get("entries"):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(flight))
    return True


def last_collective(trace: TracebackType | None) -> str:
    """What the last call of torch.distributed in a traceback was, and among which ranks.

    One that runs in the background fails where it is waited for: then that place is named.
    """
    found, inside = "a message between processes", False
    while trace is not None:
        code = trace.tb_frame.f_code
        if _is_call(code) and not inside:  # what it calls itself says less
            inside = True
            found = _named(trace.tb_frame)
        elif ("/megatron/" in code.co_filename or "/titans_dist/" in code.co_filename) and not _is_clock(code):
            inside = False
            found = f"{code.co_name}, waiting for a collective"
        trace = trace.tb_next
    return found


def _main_frame() -> FrameType:
    """The innermost frame of the main thread, or of the thread that computes its backward pass on a GPU."""
    frames, own = sys._current_frames(), threading.get_ident()
    main = threading.main_thread().ident
    frame = frames.get(main, frames[own])  # type: ignore[arg-type]
    if frame.f_code.co_name == "_engine_run_backward":
        for thread, other in frames.items():
            # Autograd's threads are started by C++: Python's begin in threading.py.
            if thread not in (own, main) and not list(_outwards(other))[-1].f_code.co_filename.endswith("threading.py"):
                return other
    return next(_outwards(frame))


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        if not _is_clock(frame.f_code):
            yield frame
        frame = frame.f_back


def _is_clock(code: CodeType) -> bool:
    """Whether this is the function of `waiting` that stands around every wait."""
    return code.co_filename.endswith("titans_dist/parallel/waiting.py")


def _line(innermost: FrameType) -> str:
    frame = next((frame for frame in _outwards(innermost) if not _is_library(frame.f_code.co_filename)), innermost)
    return f"{frame.f_code.co_name} at {'/'.join(Path(frame.f_code.co_filename).parts[-3:])}:{frame.f_lineno}"


def _is_library(file: str) -> bool:
    return file.startswith((_STDLIB, "<frozen")) or ("/site-packages/" in file and "/titans_" not in file)


def _collective(innermost: FrameType) -> str | None:
    call = _call(innermost)
    if call is not None:
        return _named(call)
    return f"{innermost.f_code.co_name}, waiting for a collective" if _waits_in_background(innermost) else None


def _call(innermost: FrameType) -> FrameType | None:
    """The outermost of the functions of torch.distributed in which a thread is; what it calls itself says less."""
    found = None
    for frame in _outwards(innermost):
        file = frame.f_code.co_filename
        if _is_call(frame.f_code):
            found = frame
        elif "/megatron/" in file or "/titans_dist/" in file or (found is not None and "/torch/" not in file):
            break
    return found


def _waits_in_background(innermost: FrameType) -> bool:
    """Whether a thread waits for a collective that was begun earlier: `wait` is C++, and its line all there is."""
    file = innermost.f_code.co_filename
    if file.endswith("threading.py"):
        return False
    return ".wait(" in linecache.getline(file, innermost.f_lineno)


def _is_call(code: CodeType) -> bool:
    is_public = not code.co_name.startswith("_") and code.co_name not in ("wait", "wrapper")
    return is_public and code.co_filename.endswith(("distributed_c10d.py", "_functional_collectives.py"))


def _named(frame: FrameType) -> str:
    group = frame.f_locals.get("group")
    members = None
    with contextlib.suppress(Exception):  # a group that is being made or destroyed
        members = dist.get_process_group_ranks(group) if isinstance(group, dist.ProcessGroup) else None
        if members is not None and len(members) == dist.get_world_size():
            members = None
    return f"{frame.f_code.co_name} among {'all ranks' if members is None else _listed(members)}"


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:_SHOWN_RANKS]))
    return f"ranks {shown}" + (f", ... ({len(ranks)} ranks)" if len(ranks) > _SHOWN_RANKS else "")


def _flight(**options: bool) -> dict[str, Any]:
    dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None)
    return {} if dump is None else dict(json.loads(dump(**options)))
