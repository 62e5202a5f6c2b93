"""A checkpoint of any layout, engine or ZeRO stage goes on on any other, optimizer, carried state and all."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.conftest import rewound
from tests.training.jobs import SIZES, TEXT, Run, finish

SAVED, NEXT = 4, 5
STEPS = SAVED + NEXT
TRAIN = (
    "train",
    *TEXT,
    *SIZES,
    "model.num_layers=4",
    "training.micro_batch_size=2",
    f"training.steps={STEPS}",
)
CARRIED = ("training.carry_state=true", "data.documents=packed")
LAYOUTS: dict[str, tuple[tuple[str, ...], int]] = {
    "single": (("parallel.tensor=1",), 1),
    "tensor2": (("parallel.tensor=2",), 2),
    "data2": (("parallel.tensor=1", "parallel.data=2"), 2),
    "pipeline2": (("parallel.tensor=1", "parallel.pipeline=2"), 2),
    "interleaved": (("parallel.tensor=1", "parallel.pipeline=2", "parallel.virtual=2"), 2),
    "context2": (("parallel.tensor=1", "parallel.context=2", "parallel.context_mode=ring"), 2),
    "tensor2 x data2": (("parallel.tensor=2", "parallel.data=2"), 4),
    "tensor2 x pipeline2": (("parallel.tensor=2", "parallel.pipeline=2"), 4),
    "zero0": (("parallel.tensor=1", "parallel.data=2", "training.engine=deepspeed", "training.zero_stage=0"), 2),
    "zero1": (("parallel.tensor=1", "parallel.data=2", "training.engine=deepspeed", "training.zero_stage=1"), 2),
    "zero2": (("parallel.tensor=2", "parallel.data=2", "training.engine=deepspeed", "training.zero_stage=2"), 4),
    "zero3": (("parallel.tensor=1", "parallel.data=2", "training.engine=deepspeed", "training.zero_stage=3"), 2),
}
"""Name -> overrides and number of processes."""
CARRYING = ("single", "tensor2", "data2", "interleaved")
"""Some of the layouts on which memory can be carried from step to step."""
ROUND = (
    *("single", "tensor2", "data2", "pipeline2", "interleaved"),
    *("context2", "tensor2 x pipeline2", "zero1", "zero3"),
)
"""Each of these goes on on the next one, and the next one on it; all other pairs are in the matrix."""
RING = list(zip(ROUND, [*ROUND[1:], ROUND[0]], strict=True))
PAIRS = [*RING, *((there, here) for here, there in RING)]
Unbroken = Callable[..., Run]


@pytest.fixture(scope="session")
def unbroken(home: Path) -> Unbroken:
    """unbroken("tensor2") is the run of that layout that nothing ever disturbed; also with more overrides."""
    runs: dict[str, Run] = {}

    def run(layout: str, *more: str) -> Run:
        name = f"layout-{layout.replace(' ', '')}" + ("-carried" if more else "")
        if name not in runs:
            overrides, world = LAYOUTS[layout]
            finish(home, *TRAIN, *overrides, *more, f"name={name}", world=world)
            runs[name] = Run(home / "runs" / name)
        return runs[name]

    return run


def resumed(home: Path, source: Run, layout: str, name: str, *more: str) -> Run:
    """A copy of `source` as it was after its checkpoint, gone on on another layout."""
    run = rewound(source, name, SAVED)
    overrides, world = LAYOUTS[layout]
    finish(home, *TRAIN, *overrides, *more, f"name={name}", world=world)
    assert run.after_resume() == list(range(SAVED + 1, STEPS + 1))
    return run


def check_pair(before: str, after: str, home: Path, name: str, unbroken: Unbroken, *more: str) -> None:
    whole = unbroken(before, *more)
    run = resumed(home, whole, after, name, *more)
    assert run.losses == pytest.approx(whole.losses, rel=2e-5)
    norms = [{step: norm for step, (_, norm, _) in each.curve.items()} for each in (run, whole)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_the_next_losses_are_those_of_the_unbroken_run(
    before: str, after: str, home: Path, name: str, unbroken: Unbroken
) -> None:
    check_pair(before, after, home, name, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), zip(CARRYING, [*CARRYING[1:], CARRYING[0]], strict=True))
def test_memory_that_is_carried_along_goes_on_too(
    before: str, after: str, home: Path, name: str, unbroken: Unbroken
) -> None:
    check_pair(before, after, home, name, unbroken, *CARRIED)


MATRIX = pytest.mark.matrix
REST = [pair for pair in itertools.permutations(LAYOUTS, 2) if pair not in PAIRS]


@pytest.mark.matrix
@pytest.mark.parametrize(("before", "after"), REST)
def test_every_other_pair_too(before: str, after: str, home: Path, name: str, unbroken: Unbroken) -> None:
    check_pair(before, after, home, name, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        layout
        if layout in ("interleaved", "tensor2 x pipeline2", "zero1", "zero3")
        else pytest.param(layout, marks=MATRIX)
        for layout in LAYOUTS
    ],
)
def test_on_the_same_layout_everything_is_bit_equal(layout: str, home: Path, name: str, unbroken: Unbroken) -> None:
    run = resumed(home, unbroken(layout), layout, name)
    assert run.curve == unbroken(layout).curve
    run.store.verify(STEPS)
    assert weights(run) == weights(unbroken(layout))


def weights(run: Run) -> dict[str, str]:
    """SHA-256 of the tensors of the last checkpoint: weights, moments and carried state of every rank."""
    import json

    manifest = json.loads((run.store.folder(STEPS) / "manifest.json").read_text())
    files = {name: entry["sha256"] for name, entry in manifest["files"].items() if name.endswith(".distcp")}
    assert files
    return files


def test_losses_of_the_layouts_agree_so_that_equal_means_equal_training(unbroken: Unbroken) -> None:
    one = unbroken("single").losses
    assert one[STEPS] < one[1] - 0.1
    for layout in ("tensor2", "interleaved", "zero3"):
        assert unbroken(layout).losses == pytest.approx(one, abs=1e-3)
