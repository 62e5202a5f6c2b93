"""The driver and its actors on a real Ray: every piece is measured once, whoever dies."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from titans_dist.config import Config, EvaluationConfig, UserError
from titans_dist.evaluation import actor
from titans_dist.evaluation.pool import Pool
from titans_dist.evaluation.work import Piece, Result, pieces

ray = pytest.importorskip("ray")


class StandIn:
    """An actor without a model. Its run folder holds a log of all legs, and what is to happen to which piece."""

    def __init__(self, config: Config, step: int, rank: int) -> None:
        self.folder, self.rank = Path(config.run_dir), rank

    def place(self) -> tuple[str, int]:
        return "127.0.0.1", 0

    def join(self, place: tuple[str, int]) -> str:
        if (self.folder / "cannot begin").exists():
            raise UserError("the checkpoint is damaged")
        (self.folder / f"joined {os.getpid()}").touch()
        return "here"

    def advance(self, piece: Piece, progress: Any) -> tuple[bool, Any]:
        leg = (progress or 0) + 1
        while (self.folder / "all together").exists() and len(list(self.folder.glob("joined *"))) < 2:
            time.sleep(0.05)
        fate = self.folder / f"{piece.task} {piece.first} leg {leg}"
        if fate.exists():
            what = fate.read_text()
            if what == "die once":
                fate.unlink()
            if what.startswith("die"):
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)
            raise ValueError(what)
        with (self.folder / "log").open("a") as log:
            log.write(f"{piece.task} {piece.first} {leg} {os.getpid()} {self.rank}\n")
        time.sleep(0.05)
        if piece.task == "long" and leg < 4:
            return False, leg
        return True, Result([1.0] * piece.count, "digest", piece.length, 0.1, 1, {"leg": [leg]})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(actor, "Process", StandIn)
    return tmp_path


def config(folder: Path, **changes: Any) -> Config:
    settings = {"tasks": ["short", "long"], "lengths": [64], "samples": 16, "shard": 4, **changes}
    return Config(name="x", run_dir=str(folder), evaluation=EvaluationConfig(**settings))


def measure(config: Config) -> tuple[list[tuple[str, int]], list[str], list[list[str]]]:
    """The pieces in the order of their results, what was said, and the legs that were done."""
    found: list[tuple[str, int]] = []
    said: list[str] = []
    with Pool(config, 1) as pool:
        pool.measure(
            pieces(config.evaluation), lambda piece, result: found.append((piece.task, piece.first)), said.append
        )
    return found, said, legs(config)


def legs(config: Config) -> list[list[str]]:
    return [line.split() for line in (Path(config.run_dir) / "log").read_text().splitlines()]


ALL = sorted((task, first) for task in ("short", "long") for first in (0, 4, 8, 12))


def test_every_piece_is_measured_once_by_two_workers(folder: Path) -> None:
    (folder / "all together").touch()  # or one of them may be done before the other has begun
    found, said, done = measure(config(folder))
    assert sorted(found) == ALL
    assert sorted((task, int(leg)) for task, _, leg, _, _ in done) == sorted(
        [("short", 1)] * 4 + [("long", leg) for leg in (1, 2, 3, 4)] * 4
    )
    assert len({pid for *_, pid, _ in done}) == 2
    assert {"worker 1 of 2 is ready on here", "worker 2 of 2 is ready on here"} < {*said}
    assert said[-1].startswith("8 of 8 pieces | ") and "eta" in said[-1]


def test_after_the_death_of_a_worker_another_goes_on_from_the_last_leg(folder: Path) -> None:
    (folder / "long 4 leg 3").write_text("die once")
    (folder / "short 8 leg 1").write_text("die once")
    found, said, done = measure(config(folder))
    assert sorted(found) == ALL
    assert len(done) == 4 + 4 * 4, "no leg is repeated but those that died"
    assert len({pid for task, first, _, pid, _ in done if (task, first) == ("long", "4")}) == 2
    assert sum("its worker has died" in line for line in said) == 2


def test_a_piece_that_kills_every_worker_is_given_up_and_the_others_are_measured(folder: Path) -> None:
    (folder / "short 4 leg 1").write_text("die always")
    with pytest.raises(UserError, match=r"short at 64 tokens, samples 4 to 7 has lost 2 workers .* everything else is"):
        measure(config(folder, retries=1))
    assert {(task, int(first)) for task, first, *_ in legs(config(folder))} == {*ALL} - {("short", 4)}


def test_what_the_code_raises_is_not_tried_again_and_never_a_zero(folder: Path) -> None:
    (folder / "short 0 leg 1").write_text("no such thing")
    with pytest.raises(UserError, match="short at 64 tokens, samples 0 to 3 cannot be measured: ValueError"):
        measure(config(folder))
    assert len(legs(config(folder))) == 3 + 4 * 4


def test_a_copy_of_two_processes_does_each_leg_together_and_dies_together(folder: Path) -> None:
    (folder / "long 8 leg 2").write_text("die once")
    found, _, done = measure(config(folder, tensor=2, workers=1, cpus=0.5))
    assert sorted(found) == ALL
    assert {rank for *_, rank in done} == {"0", "1"}


def test_workers_that_cannot_begin_say_why(folder: Path) -> None:
    (folder / "cannot begin").touch()
    with pytest.raises(UserError, match="a worker cannot begin: the checkpoint is damaged"):
        measure(config(folder))


def test_a_cluster_that_is_not_there_is_one_sentence(folder: Path) -> None:
    with pytest.raises(UserError, match=r"Ray at 127.0.0.1:1 cannot be reached"):
        Pool(config(folder, address="127.0.0.1:1"), 1)


def test_a_cluster_without_gpus_is_one_sentence(folder: Path) -> None:
    with pytest.raises(UserError, match="Ray has 0 GPUs, and one worker needs 1"):
        Pool(config(folder, gpus=1.0), 1)


def test_a_sigterm_is_handled_as_before(folder: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Pool(config(folder), 1):
        assert signal.getsignal(signal.SIGTERM) is before
