"""One process of a copy of the model, as Ray's actors run it."""

from __future__ import annotations

import dataclasses
import datetime
import os
import socket
from pathlib import Path
from typing import Any

from titans_dist.config import Config
from titans_dist.evaluation.work import Piece

LONG = 1 << 16
"""Tokens from which on samples are made in a process of their own: that takes more memory than reading them."""


class Process:
    """Loads one checkpoint, once, and measures pieces with it."""

    def __init__(self, config: Config, step: int, rank: int) -> None:
        """`rank` among the evaluation.tensor processes of this copy."""
        self.config, self.step, self.rank = reading(config), step, rank
        self._measuring: Any = None

    def place(self) -> tuple[str, int]:
        """Where the processes of this copy meet: an address and a free port of this one's machine."""
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def join(self, place: tuple[str, int]) -> str:
        """Meet the others, build the model, load the checkpoint; the name of the machine."""
        import torch
        import torch.distributed as dist

        from titans_dist.checkpoint.sharded import load
        from titans_dist.checkpoint.store import Store
        from titans_dist.evaluation.material import gather
        from titans_dist.evaluation.measure import Measuring
        from titans_dist.parallel import cpu
        from titans_dist.parallel.processes import choose_device, make_groups
        from titans_dist.parallel.reader import Reader

        os.environ.setdefault("LOCAL_RANK", "0")
        device = choose_device(self.config.training.device, 0)  # Ray shows a process its own GPUs alone
        if device.type == "cpu":
            torch.set_num_threads(max(1, int(self.config.evaluation.cpus)))
        cpu.install()
        store = dist.TCPStore(*place, self.config.parallel.tensor, is_master=self.rank == 0)
        timeout = datetime.timedelta(seconds=self.config.cluster.timeout_s)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store, rank=self.rank, world_size=self.config.parallel.tensor, timeout=timeout
        )
        make_groups(self.config.parallel, self.config.cluster.timeout_s)
        reader = Reader(self.config, device)
        checkpoints = Store(Path(self.config.run_dir) / "checkpoints")
        reader.load(load(checkpoints, self.step, reader.sharded_state(), partial=True))
        self._measuring = Measuring(reader, gather(self.config))
        return os.environ.get("SLURMD_NODENAME") or socket.gethostname()

    def advance(self, piece: Piece, progress: Any) -> tuple[bool, Any]:
        """Whether the piece is done, and its result or how far it is."""
        from titans_dist.evaluation.measure import Progress
        from titans_dist.evaluation.work import Result

        if progress is None and piece.length >= LONG:
            self._have_made(piece)
        made = self._measuring.advance(piece, progress or Progress())
        return isinstance(made, Result), made

    def _have_made(self, piece: Piece) -> None:
        """Have a process beside this one make the samples of a piece, unless they are there or need no making."""
        import ray
        import torch.distributed as dist
        from ray.exceptions import RayTaskError

        samples = self._measuring.material.samples
        if samples is None or piece.task not in samples.tasks:
            return
        if self.rank == 0 and not samples.are_made(piece):
            try:
                ray.get(ray.remote(make).options(num_cpus=0).remote(self.config, piece))
            except RayTaskError as error:
                raise error.cause from None
        dist.barrier()


def make(config: Config, piece: Piece) -> None:
    """Make the samples of a piece, for others to read."""
    from titans_dist.evaluation.material import gather

    samples = gather(config).samples
    assert samples is not None
    samples.of(piece)


def reading(config: Config) -> Config:
    """The configuration of one copy that reads: split by evaluation.tensor alone, whatever trained it."""
    parallel = dataclasses.replace(
        config.parallel,
        tensor=config.evaluation.tensor,
        sequence=False,
        pipeline=1,
        virtual=1,
        layers=None,
        context=1,
        data=1,
    )
    return dataclasses.replace(config, parallel=parallel)
