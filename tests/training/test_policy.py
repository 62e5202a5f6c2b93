"""The health policy in whole jobs: what is redone, skipped or gone back from, and that a restart agrees."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.training.conftest import rewound
from tests.training.jobs import DATA_2, SINGLE, SIZES, STEPS, TENSOR_2, TEXT, Run, finish, job
from tests.training.moments import Before

TRAIN = ("train", *TEXT, *SIZES)
LAYER = "blocks.1.mlp.up"
Unbroken = Callable[[str], Run]


def poisoned(steps: set[int], seen: Path | None = None, rank_with_it: int = 0, times: int = 99) -> Before:
    """The first `times` computations of these steps give NaN in `LAYER`, in one rank.

    What each of rank 0's computations reads is noted in `seen`, as (step of the run, first tokens).
    """

    def before(rank: int) -> None:
        from titans_dist.parallel.engine import Engine, StepResult

        take = Engine.step

        def step(engine: Engine, batches: list[Any], *more: Any) -> StepResult:
            number = engine.scheduler.num_steps + 1
            if seen is not None and rank == 0:
                with seen.open("a") as file:
                    file.write(json.dumps([number, batches[0]["tokens"][0].tolist()]) + "\n")
            if number not in steps or rank != rank_with_it or len(spoiled) == times:
                return take(engine, batches, *more)
            spoiled.append(number)
            layer = engine.stages[0].model.get_submodule(LAYER)
            hook = layer.register_forward_hook(lambda module, inputs, output: _spoiled(output))
            try:
                return take(engine, batches, *more)
            finally:
                # The culprit is looked for after the step.
                hooks.append(hook)

        hooks: list[Any] = []
        spoiled: list[int] = []

        def sound(engine: Engine, batches: list[Any], *more: Any) -> StepResult:
            while hooks:
                hooks.pop().remove()
            return step(engine, batches, *more)

        mock.patch.object(Engine, "step", sound).start()

    return before


def _spoiled(output: Any) -> Any:
    return (output[0] * math.nan, *output[1:]) if isinstance(output, tuple) else output * math.nan


@pytest.mark.parametrize(("layout", "overrides"), [("tensor2", TENSOR_2), ("data2", DATA_2)])
def test_a_fault_of_the_machine_is_computed_again_and_leaves_no_trace_in_the_curve(
    layout: str, overrides: tuple[str, ...], home: Path, name: str, tmp_path: Path, unbroken: Unbroken
) -> None:
    fault = {"id": 0, "kind": "nan", "step": 6, "rank": 1, "seconds": 0, "steps": 1}
    (tmp_path / "faults.json").write_text(json.dumps([fault]))

    def before(rank: int) -> None:
        os.environ["TITANS_DIST_FAULTS"] = str(tmp_path / "faults.json")

    finish(home, *TRAIN, *overrides, f"name={name}", world=2, before=before)
    run = Run(home / "runs" / name)
    (redone,) = run.events("redone")
    assert redone["step"] == 6 and redone["why"].startswith("gradient norm nan")
    assert run.events("unhealthy") == []
    assert run.curve == unbroken(layout).curve


@pytest.mark.parametrize(("overrides", "world"), [(SINGLE, 1), (TENSOR_2, 2), (DATA_2, 2)])
def test_a_step_that_stays_bad_is_skipped_as_if_it_had_not_been(
    overrides: tuple[str, ...], world: int, home: Path, name: str
) -> None:
    finish(home, *TRAIN, *overrides, f"name={name}", world=world, before=poisoned({6}, rank_with_it=world - 1))
    run = Run(home / "runs" / name)
    (event,) = run.events("unhealthy")
    assert (event["step"], event["action"], event["is_updated"]) == (6, "skip", False)
    where = f"{LAYER} in process 1" if overrides == DATA_2 else LAYER
    assert event["why"].startswith("loss nan: the first output that is not finite is that of " + where)

    def never_taken(rank: int) -> None:
        from titans_dist.parallel.engine import Engine
        from titans_dist.parallel.results import StepResult

        take = Engine.step

        def step(engine: Engine, batches: list[Any], *more: Any) -> StepResult:
            if engine.scheduler.num_steps == 5:
                return StepResult(1.0, 1.0, 0.0, False)
            return take(engine, batches, *more)

        mock.patch.object(Engine, "step", step).start()

    finish(home, *TRAIN, *overrides, f"name={name}-without", world=world, before=never_taken)
    without = Run(home / "runs" / f"{name}-without")
    for step in {*range(1, STEPS + 1)} - {6}:
        assert run.curve[step] == without.curve[step]


def test_going_back_leaves_out_the_data_and_a_restart_does_so_too(home: Path, name: str, tmp_path: Path) -> None:
    """Step 6 is bad; the run goes back to its checkpoint of step 4 and never reads what steps 5 and 6 have read."""
    back = (*TRAIN, *SINGLE, "health.skips=0", "health.lower_lr=1", "health.rollback_to=1")
    seen = {which: tmp_path / which for which in ("plain", "back")}
    finish(home, *back, "training.steps=14", f"name={name}-plain", before=poisoned(set(), seen["plain"]))
    plain = dict(read(seen["plain"]))

    finish(home, *back, f"name={name}", before=poisoned({6}, seen["back"], times=2))
    run = Run(home / "runs" / name)
    (unhealthy,), (went,) = run.events("unhealthy"), run.events("went_back")
    assert (unhealthy["step"], unhealthy["action"]) == (6, "go back")
    assert (went["step"], went["from_step"], went["left_out"]) == (4, 6, 2)
    reads = read(seen["back"])
    wanted = [(step, step) for step in (1, 2, 3, 4, 5, 6, 6)] + [(step, step + 2) for step in range(5, STEPS + 1)]
    assert [step for step, _ in reads] == [step for step, _ in wanted]
    for (step, tokens), (_, window) in zip(reads, wanted, strict=True):
        assert tokens == plain[window], f"step {step}"
    assert run.store.committed() == [4, 8, 12]

    again = rewound(run, f"{name}-again", 8)
    finish(home, *back, f"name={name}-again")
    assert again.after_resume() == list(range(9, STEPS + 1))
    assert again.curve == run.curve


def read(path: Path) -> list[tuple[int, list[int]]]:
    return [(step, tokens) for step, tokens in map(json.loads, path.read_text().splitlines())]


def test_the_ladder_ends_with_its_own_exit_code_and_sound_checkpoints(home: Path, name: str) -> None:
    with job(home, *TRAIN, *TENSOR_2, "optimizer.lr=1e9", "health.skips=1", f"name={name}", world=2) as failed:
        assert failed.wait() == [5, 5], failed.out + failed.err
    run = Run(home / "runs" / name)
    actions = [row["action"] for row in run.events("unhealthy")]
    assert actions[:2] == ["skip", "lower"] and actions[-1] == "give up"
    assert set(actions[2:-1]) <= {"go back"}
    (line,) = failed.err.splitlines()
    assert line.startswith("titans-dist: step ") and line.endswith("or look at the event rows of metrics.jsonl")
    for step in run.store.committed():
        run.store.verify(step)
