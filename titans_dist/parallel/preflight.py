"""The preflight of a job: every process examines its machine, then all of them what is between them.

Each writes what it knows and what it does to a file of its own, so that one that hangs or dies is named by the others:
whoever has not given up with them, or stands still at an earlier stage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from titans_dist.config import Config
from titans_dist.parallel.machine import Findings, examine, host
from titans_dist.parallel.processes import choose_device

ROUNDS = 5
"""Questions to each clock: the quickest answer tells best."""
LINK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""Sent round the ring, and three times: enough for full speed, a fraction of a second on a network that works."""
SETTLE_S = 3.0
"""After so long each process that gives up has said so, on a network file system too."""
TOGETHER = (
    "meeting the others",
    "asking clocks",
    "sending to the next process",
    "the sum over all processes",
    "telling the others",
)
"""Stages in which processes wait for each other, in order; before them each works alone."""
_MORE_S = 120
"""Collectives wait longer than the whole preflight may take: the end of that is what is reported."""


class Preflight:
    """The preflight of this process; `folder` holds the files of all."""

    def __init__(self, config: Config, folder: Path, job: str) -> None:
        self.config, self.folder = config, folder
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.findings = Findings(self.rank, host(), job)
        self._over, self._line = folder / "over", f"given up: {job}"
        # Of a job without a name, earlier ones may have left such a line.
        self._known = 0 if job else self._given_up()

    def run(self) -> list[Findings]:
        """What all processes have found. Raises RuntimeError where another one is gone."""
        self.mark("its start")
        with contextlib.suppress(OSError):
            self._over.touch()
        device = self._device()
        examine(self.findings, Path(self.config.run_dir), device, self.mark)
        self.mark(TOGETHER[0])
        timeout = datetime.timedelta(seconds=self.config.cluster.timeout_s + _MORE_S)
        dist.init_process_group("gloo", timeout=timeout)
        self.mark(TOGETHER[1])
        self.findings.clock_s = _clock_offset()
        self.mark(TOGETHER[2])
        kinds: list[str] = [""] * self.world
        dist.all_gather_object(kinds, device.type)
        if set(kinds) == {"cuda"}:
            group = dist.new_group(backend="nccl", timeout=timeout)
        else:
            device, group = torch.device("cpu"), None
        self._ring(device, group)
        self.mark(TOGETHER[3])
        self._sum(device, group)
        self.mark(TOGETHER[4])
        everybody: list[dict[str, object]] = [{}] * self.world
        dist.all_gather_object(everybody, dataclasses.asdict(self.findings))
        return [Findings.read(facts) for facts in everybody]

    def leave(self) -> None:
        """Part from the others, when all are ready to."""
        dist.barrier()
        dist.destroy_process_group()

    def mark(self, stage: str) -> None:
        """Write down what this process does next, and what it has found so far."""
        self.findings.stage = stage
        self._write()

    def give_up(self) -> list[Findings | None]:
        """Write down that this process goes no further; what all processes had written when each had time to."""
        self.findings.ended = True
        self._write()
        # In place: clients of a network file system see that in a file they know sooner than they see a new one.
        with contextlib.suppress(OSError), self._over.open("a") as file:
            file.write(f"{self._line}\n")
        time.sleep(SETTLE_S)
        found: list[Findings | None] = []
        for rank in range(self.world):
            try:
                one = Findings.read(json.loads(self._path(rank).read_text()))
            except (OSError, ValueError, KeyError, TypeError):
                found.append(None)
            else:
                found.append(one if one.job == self.findings.job else None)
        found[self.rank] = self.findings
        return found

    def is_over(self) -> bool:
        """Whether a process has given up: those that have no connection to one that died would wait for ever."""
        return self._given_up() > self._known

    def _given_up(self) -> int:
        try:
            return self._over.read_text().splitlines().count(self._line)
        except OSError:
            return 0

    def _device(self) -> torch.device:
        """This process's device; one without the GPU it should have is a finding."""
        local = int(os.environ.get("LOCAL_RANK", "0"))
        wanted = "cuda" if self.config.cluster.gpus_per_node else self.config.training.device
        has_one = torch.cuda.is_available() and local < torch.cuda.device_count()
        if wanted == "cuda" and not has_one:
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            self.findings.problems.append(f"torch sees {count} GPUs, none for process {local} of this machine")
            wanted = "cpu"
        device = choose_device(wanted, local) if has_one or wanted == "cpu" else torch.device("cpu")
        if device.type == "cpu":
            torch.set_num_threads(self.config.cluster.threads)
        else:
            torch.cuda.set_device(device)
        return device

    def _ring(self, device: torch.device, group: dist.ProcessGroup | None) -> None:
        """Each process sends known numbers to the next one at the same time, and times what comes to it."""
        if self.world == 1:
            return
        count = LINK_BYTES[device.type] // 4
        before, after = (self.rank - 1) % self.world, (self.rank + 1) % self.world
        sent, came = _pattern(count, self.rank, device), torch.empty(count, device=device)
        best = float("inf")
        for _ in range(3):
            dist.barrier()
            began = time.perf_counter()
            exchange = [dist.P2POp(dist.isend, sent, after, group), dist.P2POp(dist.irecv, came, before, group)]
            for work in dist.batch_isend_irecv(exchange):
                work.wait()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - began)
        self.findings.link_bytes_per_s = 4 * count / best
        self.findings.wrong_link = not torch.equal(came, _pattern(count, before, device))

    def _sum(self, device: torch.device, group: dist.ProcessGroup | None) -> None:
        """Whole numbers, whose sum is exact whatever its order."""
        count = LINK_BYTES[device.type] // 16
        total = torch.arange(count, device=device, dtype=torch.float32) % 1024 * (self.rank + 1)
        dist.all_reduce(total, group=group)
        ranks = self.world * (self.world + 1) // 2
        # In float32 whole numbers are exact up to 2^24: with more processes the last digits are not compared.
        right = torch.arange(count, device=device, dtype=torch.float32) % 1024 * ranks
        self.findings.wrong_sum = not torch.allclose(total, right, rtol=1e-5, atol=0.0)

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.json"

    def _write(self) -> None:
        path = self._path(self.rank)
        with contextlib.suppress(OSError):  # the check of the run folder tells
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_suffix(".tmp")
            new.write_text(json.dumps(dataclasses.asdict(self.findings), indent=1) + "\n")
            new.replace(path)


def _pattern(count: int, rank: int, device: torch.device) -> torch.Tensor:
    return (torch.arange(count, device=device, dtype=torch.float32) * 7 + rank) % 8191


def _clock_offset(clock: Callable[[], float] = time.time) -> float:
    """Seconds that this process's clock is ahead of rank 0's, which asks one after the other. Collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    offsets = torch.zeros(world, dtype=torch.float64)
    answer = torch.zeros(1, dtype=torch.float64)
    if rank == 0:
        for other in range(1, world):
            quickest = float("inf")
            for _ in range(ROUNDS):
                began = clock()
                dist.send(answer, other)
                dist.recv(answer, other)
                ended = clock()
                if ended - began < quickest:
                    quickest = ended - began
                    offsets[other] = float(answer) - (began + ended) / 2
    else:
        for _ in range(ROUNDS):
            dist.recv(answer, 0)
            answer.fill_(clock())
            dist.send(answer, 0)
    dist.broadcast(offsets, 0)
    return float(offsets[rank])
