"""Real processes with gloo for the tests: ``run_distributed(fn, world, *args)``.

The ranks are forked from the test process after one import of torch and megatron-core: 0.2 s for four ranks, where
spawned interpreters need 19 s. Fork has its traps, and each is met here once:

* A thread pool does not survive a fork, and the child then waits for it for ever. ``torch.set_num_threads(1)`` keeps
  OpenMP from starting one in the parent. On a machine with GPUs, a test must also not call ``backward()`` or touch
  CUDA in the parent before it forks.
* Ranks never see a GPU (``CUDA_VISIBLE_DEVICES=""``), so that the CPU adapter works on every machine.
* A child must not run the parent's exit handlers; ``multiprocessing`` leaves it with ``os._exit``.
* Results travel as plain pickle bytes: torch's own pickling would pass tensors as file descriptors, which die with
  the child before the parent opens them.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import importlib
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_PRE_IMPORTS = (
    "titans_dist.megatron",
    "megatron.core.parallel_state",
    "megatron.core.tensor_parallel",
    "megatron.core.pipeline_parallel",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.optimizer_param_scheduler",
    "megatron.core.dist_checkpointing",
)


_Ranks = list[tuple[BaseProcess, Connection]]  # the process and the receiving end of its pipe, in order of rank


class RankError(AssertionError):
    """A rank failed, died or hung; the message names the rank and carries its traceback or stack."""


def run_distributed(fn: Callable[..., Any], world: int, *args: Any, timeout_s: float = 60) -> list[Any]:
    """Run ``fn(rank, world, *args)`` in ``world`` forked processes that share one gloo process group.

    Returns the ranks' return values in order of rank; they must be picklable. ``fn`` itself may be a closure.
    Raises RankError for the first rank that failed, died or did not finish in ``timeout_s``; all others are killed.
    """
    prepare_parent()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks: _Ranks = []
        try:
            for rank in range(world):
                receiver, sender = context.Pipe(duplex=False)
                process: BaseProcess = context.Process(
                    target=_rank_main, args=(fn, rank, world, args, Path(folder), sender, timeout_s)
                )
                process.start()
                sender.close()  # so that the death of the child is an end of file for the parent
                ranks.append((process, receiver))
            return _collect(ranks, Path(folder), timeout_s)
        finally:
            for process, receiver in ranks:
                process.kill()
                process.join()
                receiver.close()


def prepare_parent() -> None:
    """What a process imports and sets before it forks ranks."""
    import torch

    torch.set_num_threads(1)
    for module in _PRE_IMPORTS:
        importlib.import_module(module)


def _collect(ranks: _Ranks, folder: Path, timeout_s: float) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    rank_of = {receiver: rank for rank, (_, receiver) in enumerate(ranks)}
    while len(results) < len(ranks):
        pending = [receiver for receiver, rank in rank_of.items() if rank not in results]
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(_describe_hang(ranks, sorted(set(rank_of.values()) - set(results)), folder, timeout_s))
        failures: list[tuple[float, str]] = []
        for receiver in ready:
            rank = rank_of[receiver]  # type: ignore[index]
            process = ranks[rank][0]
            try:
                when, error, result = pickle.loads(receiver.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                process.join()
                failures.append((0.0, f"rank {rank} of {len(ranks)} died with exit code {process.exitcode}"))
                continue
            if error is None:
                results[rank] = result
            else:
                failures.append((when, f"rank {rank} of {len(ranks)} failed:\n{error}"))
        if failures:  # the first failure is the cause; a peer's "connection closed" only follows from it
            raise RankError(min(failures)[1])
    for process, _ in ranks:
        process.join(timeout=max(1.0, deadline - time.monotonic()))
    return [results[rank] for rank in range(len(ranks))]


def _describe_hang(ranks: _Ranks, hung: list[int], folder: Path, timeout_s: float) -> str:
    for rank in hung:
        pid = ranks[rank][0].pid
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
    time.sleep(0.3)
    stacks = "".join(f"\nrank {rank}:\n{_stack_file(folder, rank).read_text()}" for rank in hung)
    return f"rank(s) {', '.join(map(str, hung))} of {len(ranks)} did not finish in {timeout_s:g} s{stacks}"


def _stack_file(folder: Path, rank: int) -> Path:
    return folder / f"stack_{rank}.txt"


def _rank_main(
    fn: Callable[..., Any], rank: int, world: int, args: tuple[Any, ...], folder: Path, sender: Connection, limit: float
) -> None:
    import torch
    import torch.distributed as dist

    stacks = _stack_file(folder, rank).open("w")  # faulthandler needs it open until the end
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", RANK=str(rank), WORLD_SIZE=str(world))
    # No rank sees a GPU: these tests mean the same on every machine, and CUDA does not survive a fork anyway.
    os.environ.update(LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        # A file as the rendezvous: no port to be free, no race for it. gloo then connects on the loopback device.
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=limit + 30),  # the parent's limit, with the stacks, comes first
        )
        result = fn(rank, world, *args)
        message = pickle.dumps((time.monotonic(), None, result))
    except BaseException:
        message = pickle.dumps((time.monotonic(), traceback.format_exc(), None))
    sender.send_bytes(message)
    # Nobody leaves before all are done: a closed connection would fail the peers that still communicate.
    if pickle.loads(message)[1] is None:
        dist.barrier()
        dist.destroy_process_group()
