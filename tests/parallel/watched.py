"""Small jobs of real processes that watch each other, without a model: what they do is the test's."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

LIMIT_S = 45.0


class Ranks:
    """`world` forked processes, each of which does `work(rank)` under `watched_peers`; `folder` is the run folder.

    Those that are started `after` others have the same store.
    """

    def __init__(
        self, folder: Path, world: int, work: Callable[[int], None], timeout_s: float, after: Ranks | None = None
    ) -> None:
        import torch
        from torch.distributed import TCPStore

        torch.set_num_threads(1)
        self.folder = folder
        self.restarts: int = 0 if after is None else after.restarts + 1
        self._store: TCPStore = (
            TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if after is None else after._store
        )
        context = multiprocessing.get_context("fork")
        self.ranks: list[BaseProcess] = [
            context.Process(target=_main, args=(rank, world, self, self._store.port, work, timeout_s))
            for rank in range(world)
        ]
        for rank in self.ranks:
            rank.start()

    def join(self, *ranks: int) -> list[int | None]:
        """The exit codes of `ranks`, or of all."""
        deadline = time.monotonic() + LIMIT_S
        chosen = [self.ranks[rank] for rank in ranks] or self.ranks
        for process in chosen:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in chosen]

    def said(self, rank: int) -> str:
        """All that a rank has written."""
        return (self.folder / f"said-{rank}.txt").read_text()


@contextmanager
def watched(
    folder: Path, world: int, work: Callable[[int], None], timeout_s: float = 3, after: Ranks | None = None
) -> Iterator[Ranks]:
    """Ranks of which nothing is left after the block."""
    ranks = Ranks(folder, world, work, timeout_s, after)
    try:
        yield ranks
    finally:
        for process in ranks.ranks:
            process.kill()
            process.join()


def _main(rank: int, world: int, ranks: Ranks, port: int, work: Callable[[int], None], timeout_s: float) -> None:
    import torch.distributed as dist

    from titans_dist.config import UserError
    from titans_dist.parallel.peers import watched_peers

    folder = ranks.folder
    with (folder / f"said-{rank}.txt").open("wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), GLOO_SOCKET_IFNAME="lo", CUDA_VISIBLE_DEVICES="")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    # What gloo left in the store at the first start would lead the second one astray.
    store = dist.PrefixStore(str(ranks.restarts), dist.TCPStore("127.0.0.1", port, is_master=False))
    limit = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    try:
        with watched_peers(folder, timeout_s):
            work(rank)
    except UserError as error:
        print(f"titans-dist: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    dist.destroy_process_group()
