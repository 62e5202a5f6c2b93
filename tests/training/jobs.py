"""Whole jobs in real processes: every rank runs the command line's `main`, forked from the test process.

A rank finds its peers as torchrun's workers do (RANK, WORLD_SIZE, a TCP store of the starter) and behaves as under a
foreign torchrun. Forked, it needs no 5 s for the imports of torch and megatron-core; what depends on the launcher
itself is tested with real subprocesses (`tests.launch.command_line`).
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from titans_dist.checkpoint.store import Store
from titans_dist.tracking import losses, read_metrics

TIMEOUT_S = 90.0

STEPS, INTERVAL = 12, 4

SIZES = (
    "model.vocab_size=320",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_heads=4",
    "model.window=8",
    "model.persistent_tokens=2",
    "model.memory.chunk_size=16",
    "model.memory.expansion=1",
    "data.sequence_length=32",
    "training.global_batch_size=8",
    "training.micro_batch_size=4",
    f"training.steps={STEPS}",
    f"checkpoint.interval={INTERVAL}",
    "optimizer.warmup_steps=2",
    "optimizer.lr=3e-3",
    "checkpoint.asynchronous=false",
)
"""A model that trains twelve steps in two seconds, saved at exact steps however slow the disk is."""

TEXT = (
    "data=text",
    "data.source=text",
    "data.path=data/bytes",
    "data.tokenizer=bytes",
    "data.vocab_size=257",
    "data.validation_fraction=0.2",
)
TENSOR_2 = ("parallel.tensor=2",)
DATA_2 = ("parallel.tensor=1", "parallel.data=2")
PIPELINE_2 = ("parallel.tensor=1", "parallel.pipeline=2")
CONTEXT_2 = ("parallel.tensor=1", "parallel.context=2", "parallel.context_mode=ring")
SINGLE = ("parallel.tensor=1",)


class Job:
    """`world` ranks of `titans-dist ARGUMENTS` with `folder` as their current folder.

    `before(rank)` runs in each rank first: the place to make something go wrong at a chosen moment.
    """

    def __init__(
        self, folder: Path, *arguments: str, world: int = 1, before: Callable[[int], None] | None = None
    ) -> None:
        from torch.distributed import TCPStore

        _prepare_parent()
        self.folder = folder
        # The store of the starter, as torchrun has it: a port that is already bound when the ranks hear of it.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("fork")
        self.ranks = [
            context.Process(target=_rank_main, args=(rank, world, folder, arguments, self._store.port, before))
            for rank in range(world)
        ]
        for rank in self.ranks:
            rank.start()

    def wait(self) -> list[int]:
        """The exit codes of all ranks, in order of rank."""
        deadline = time.monotonic() + TIMEOUT_S
        for rank in self.ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
        hung = [number for number, rank in enumerate(self.ranks) if rank.is_alive()]
        if hung:
            self.kill()
            raise AssertionError(f"ranks {hung} did not end in {TIMEOUT_S:g} s\n{self.out}{self.err}")
        return [code for rank in self.ranks if (code := rank.exitcode) is not None]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Poll until `condition` holds; AssertionError when a rank ends first or it takes too long."""
        wait_until(condition, lambda: all(rank.is_alive() for rank in self.ranks), lambda: self.out + self.err)

    def kill(self) -> None:
        """SIGKILL all ranks at once."""
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.join()

    @property
    def out(self) -> str:
        """What rank 0 has printed so far."""
        return _console(self.folder, 0, "out").read_text()

    @property
    def err(self) -> str:
        """What rank 0 has said on stderr so far."""
        return _console(self.folder, 0, "err").read_text()


@contextmanager
def job(folder: Path, *arguments: str, world: int = 1, before: Callable[[int], None] | None = None) -> Iterator[Job]:
    """A Job of which nothing is left after the block."""
    started = Job(folder, *arguments, world=world, before=before)
    try:
        yield started
    finally:
        started.kill()


def finish(folder: Path, *arguments: str, world: int = 1, before: Callable[[int], None] | None = None) -> Job:
    """Run a job to its end, which must be a good one."""
    with job(folder, *arguments, world=world, before=before) as done:
        codes = done.wait()
        assert codes == [0] * world, f"{codes}\n{done.out}{done.err}"
    return done


def refusal(folder: Path, *arguments: str, world: int = 1) -> tuple[int, str]:
    """Run a job that all ranks refuse in one line on stderr: the exit code, and the line."""
    with job(folder, *arguments, world=world) as refused:
        codes = refused.wait()
    lines = refused.err.splitlines()
    assert len(set(codes)) == 1 and len(lines) == 1, f"{codes}\n{refused.out}{refused.err}"
    assert lines[0].startswith("titans-dist: ")
    return codes[0], lines[0]


def wait_until(condition: Callable[[], bool], alive: Callable[[], bool], story: Callable[[], Any]) -> None:
    """Poll until `condition` holds; AssertionError with `story` when `alive` does not or it takes too long."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert alive() or condition(), f"ended too early\n{story()}"
        assert time.monotonic() < deadline, f"waited {TIMEOUT_S:g} s in vain\n{story()}"
        time.sleep(0.005)


class Run:
    """What a run has left in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(folder / "checkpoints")

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        return read_metrics(path) if path.exists() else []

    @property
    def losses(self) -> dict[int, float]:
        """Loss by step."""
        return losses(self.folder / "metrics.jsonl")

    @property
    def steps(self) -> list[int]:
        """The steps in the order they were trained; a step done again comes again."""
        return [row["step"] for row in self.rows if row["kind"] == "train"]

    @property
    def curve(self) -> dict[int, tuple[float, float, float]]:
        """Step -> loss, gradient norm, learning rate; where a step was done again the later counts."""
        return {row["step"]: (row["loss"], row["grad_norm"], row["lr"]) for row in self.rows if row["kind"] == "train"}

    @property
    def status(self) -> str:
        """The word in STATUS."""
        return (self.folder / "STATUS").read_text().strip()

    def events(self, name: str) -> list[dict[str, Any]]:
        """The rows of the events of this name."""
        return [row for row in self.rows if row["kind"] == "event" and row["name"] == name]

    def after_resume(self) -> list[int]:
        """The steps trained since the last resume."""
        rows = self.rows
        last = max(number for number, row in enumerate(rows) if row.get("name") == "resume")
        return [row["step"] for row in rows[last:] if row["kind"] == "train"]


def corpus(folder: Path) -> dict[str, str]:
    """Write 40 texts of half a kilobyte to `folder`; name -> text."""
    chance = random.Random(3)
    words = ["the", "memory", "of", "a", "gate", "decays", "when", "surprise", "is", "small", "and", "grows", "else"]
    folder.mkdir(parents=True)
    texts = {f"{number:02}.txt": " ".join(chance.choices(words, k=100)) + f" {number}\n" for number in range(40)}
    for name, text in texts.items():
        (folder / name).write_text(text)
    return texts


def _console(folder: Path, rank: int, stream: str) -> Path:
    return folder / f"console-{rank}.{stream}"


def _prepare_parent() -> None:
    """Import once what every rank needs, and start no thread pool that a fork would break."""
    import torch

    torch.set_num_threads(1)
    for module in ("titans_launch.cli", "titans_launch.app", "titans_launch.train", "titans_launch.evaluate"):
        importlib.import_module(module)
    for module in ("titans_dist.training", "titans_dist.evaluation", "titans_data.sources"):
        importlib.import_module(module)


def _rank_main(
    rank: int, world: int, folder: Path, arguments: tuple[str, ...], port: int, before: Callable[[int], None] | None
) -> None:
    import torch

    from titans_launch import cli

    gc.freeze()  # megatron-core collects garbage in every save; the parent's objects need not be looked at, or copied
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        with _console(folder, rank, name).open("wb") as file:
            os.dup2(file.fileno(), number)
    # pytest has put its own objects there.
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    # No rank sees a GPU: these tests mean the same on every machine, and CUDA does not survive a fork anyway.
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    if before is not None:
        before(rank)
    sys.exit(cli.main(list(arguments)))
