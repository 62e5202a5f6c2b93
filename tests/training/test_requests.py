"""A run stops when it is asked to, at an agreed place, saved, and goes on as if it had not stopped."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from tests.training.jobs import DATA_2, PIPELINE_2, SINGLE, SIZES, STEPS, TENSOR_2, TEXT, Run, finish, job
from tests.training.moments import Before, at_steps
from titans_dist.parallel.requests import LOOK_S, deadline

TRAIN = ("train", *TEXT, *SIZES)
Unbroken = Callable[[str], Run]


def goes_on(home: Path, run: Run, layout: tuple[str, ...], world: int, unbroken: Run) -> None:
    finish(home, *TRAIN, *layout, f"name={run.folder.name}", world=world)
    assert run.curve == unbroken.curve
    assert run.status == "done"


def stopped(home: Path, name: str, layout: tuple[str, ...], world: int, before: Before, *more: str) -> tuple[Run, str]:
    with job(home, *TRAIN, *layout, *more, f"name={name}", world=world, before=before) as asked:
        assert asked.wait() == [3] * world, asked.out + asked.err
    run = Run(home / "runs" / name)
    assert run.status == "interrupted"
    return run, asked.err


@pytest.mark.parametrize(
    ("layout", "overrides", "world"),
    [("tensor2", TENSOR_2, 2), ("data2", DATA_2, 2), ("single", SINGLE, 1)],
    ids=["tensor2", "data2", "single"],
)
def test_a_signal_inside_a_step_leaves_it_between_two_micro_batches(
    layout: str, overrides: tuple[str, ...], world: int, home: Path, name: str, unbroken: Unbroken
) -> None:
    sigterm = at_steps({3: lambda rank: signal.raise_signal(signal.SIGTERM) if rank == world - 1 else None})

    def before(rank: int) -> None:
        mock.patch("titans_dist.training.loop.LOOK_S", 0).start()  # looks up after every micro-batch, short as they are
        sigterm(rank)

    small = "training.micro_batch_size=1"  # several on every layout
    run, said = stopped(home, name, overrides, world, before, small)
    assert said == "titans-dist: stopped by SIGTERM after step 2, which is saved\n"
    assert run.steps == [1, 2] and run.store.committed() == [2]
    finish(home, *TRAIN, *overrides, small, f"name={name}", world=world)
    finish(home, *TRAIN, *overrides, small, f"name={name}-unbroken", world=world)
    assert run.curve == Run(home / "runs" / f"{name}-unbroken").curve


def test_a_pipeline_ends_its_step(home: Path, name: str, unbroken: Unbroken) -> None:
    sigterm = at_steps({3: lambda rank: signal.raise_signal(signal.SIGTERM) if rank == 1 else None})
    run, said = stopped(home, name, PIPELINE_2, 2, sigterm)
    assert said == "titans-dist: stopped by SIGTERM after step 3, which is saved\n"
    goes_on(home, run, PIPELINE_2, 2, unbroken("pipeline2"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_each_of_the_signals_stops(number: signal.Signals, home: Path, name: str) -> None:
    asked = at_steps({2: lambda rank: signal.raise_signal(number)})
    whole = "training.micro_batch_size=8"  # nothing to stop between inside a step, however long it takes
    run, said = stopped(home, name, SINGLE, 1, asked, whole)
    assert said == f"titans-dist: stopped by {number.name} after step 2, which is saved\n"
    assert run.store.committed() == [2]


def test_a_signal_while_the_model_is_built_costs_nothing_and_waits_for_nothing(home: Path, name: str) -> None:
    def before(rank: int) -> None:
        from titans_dist.training import loop

        build = loop.build_engine

        def signalled(*arguments: object) -> object:
            signal.raise_signal(signal.SIGTERM)
            return build(*arguments)  # type: ignore[arg-type]

        mock.patch.object(loop, "build_engine", signalled).start()

    run, said = stopped(home, name, SINGLE, 1, before)
    assert said == "titans-dist: stopped by SIGTERM before the first step, nothing was lost; start it again to go on\n"
    assert run.steps == []


def touched(name: str, file: str, home: Path, step: int) -> Before:
    """Before `step` rank 0 makes a file in the run folder, and then waits until it is looked for again."""

    def touch(rank: int) -> None:
        if rank == 0:
            (home / "runs" / name / file).touch()
        time.sleep(1.2 * LOOK_S)

    return at_steps({step: touch})


def test_a_file_stops_the_run_and_is_gone_afterwards(home: Path, name: str, unbroken: Unbroken) -> None:
    run, said = stopped(home, name, TENSOR_2, 2, touched(name, "STOP", home, 3))
    last = run.steps[-1]
    assert said == f"titans-dist: stopped by the file STOP after step {last}, which is saved\n"
    assert 2 <= last < STEPS
    assert not (run.folder / "STOP").exists()
    goes_on(home, run, TENSOR_2, 2, unbroken("tensor2"))


def test_a_file_asks_for_a_checkpoint_and_training_goes_on(home: Path, name: str, unbroken: Unbroken) -> None:
    finish(home, *TRAIN, *TENSOR_2, f"name={name}", world=2, before=touched(name, "SAVE", home, 2))
    run = Run(home / "runs" / name)
    saved = [row["step"] for row in run.events("checkpoint")]
    assert saved[0] in (1, 2, 3) and saved[1:] == [4, 8, 12]
    assert not (run.folder / "SAVE").exists()
    assert run.curve == unbroken("tensor2").curve


def test_a_deadline_is_met_with_time_to_save(home: Path, name: str, unbroken: Unbroken) -> None:
    def slow(rank: int) -> None:
        at_steps({step: lambda _: time.sleep(1.5) for step in range(1, 50)})(rank)

    started = time.time()
    run, said = stopped(home, name, DATA_2, 2, slow, "training.max_minutes=0.25")
    assert run.store.committed()[-1] == run.steps[-1] < STEPS
    assert said == f"titans-dist: stopped by the deadline after step {run.steps[-1]}, which is saved\n"
    saved = run.events("checkpoint")[-1]
    assert saved["time"] < started + 15  # the promise itself
    goes_on(home, run, DATA_2, 2, unbroken("data2"))


def test_the_earlier_deadline_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert deadline(None) is None
    monkeypatch.setenv("TITANS_DIST_STARTED", "1000")
    assert deadline(2) == 1120
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1100")
    assert deadline(2) == deadline(None) == 1100
    monkeypatch.setenv("SLURM_JOB_END_TIME", "9999")
    assert deadline(2) == 1120
