"""Several datasets, mixed in stages: a run that is edited half way is the run that was planned so from the start."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.conftest import LAYOUTS, rewound
from tests.training.jobs import SINGLE, SIZES, STEPS, TEXT, Run, corpus, finish, refusal

SOURCES = ("data=mixture", "+data.sources.prose=data/bytes", "+data.sources.code=data/code", *TEXT[3:5])
ROW = 32
STEP_TOKENS = 8 * ROW
FIRST = "data.stages=[{weights:{prose:3,code:1}}]"
SECOND = "data.stages=[{weights:{prose:1,code:1}}]"
BOTH = f"data.stages=[{{weights:{{prose:3,code:1}}}},{{from_tokens:{8 * STEP_TOKENS},weights:{{prose:1,code:1}}}}]"


def train(home: Path, name: str, stages: str, *overrides: str, world: int = 1) -> Run:
    layout = overrides or SINGLE
    done = finish(home, "train", *SOURCES, stages, *SIZES, *layout, f"name={name}", world=world)
    run = Run(home / "runs" / name)
    run.out = done.out  # type: ignore[attr-defined]
    return run


@pytest.fixture(scope="module")
def mixed(home: Path) -> Path:
    """The home of all jobs with a second dataset."""
    from titans_data import PrepareOptions, prepare

    folder = home / "code-text"
    for name, text in corpus(folder).items():
        (folder / name).write_text("def f():\n    return " + text[:200])
    prepare(PrepareOptions("text", str(folder), tokenizer="bytes", validation_fraction=0.2), home / "data" / "code")
    return home


@pytest.fixture(scope="module")
def planned(mixed: Path) -> Run:
    """Stages 3:1 and, from step 8 on, 1:1, in one go and one process."""
    return train(mixed, "planned", BOTH)


@pytest.fixture(scope="module")
def first(mixed: Path) -> Run:
    """3:1 to the end."""
    return train(mixed, "first", FIRST)


def test_an_edit_at_a_resume_is_the_stage_that_was_planned(mixed: Path, planned: Run, first: Run, name: str) -> None:
    rewound(first, name, 8)
    run = train(mixed, name, SECOND)
    assert run.curve == planned.curve
    assert run.curve != first.curve
    edits = run.events("mixture")
    assert [edit["source"] for edit in edits] == ["prose", "code"]
    assert [edit["drawn"] for edit in edits] == [8 * 8 * 3 // 4 * ROW, 8 * 8 // 4 * ROW]
    assert [edit["drawn_at_end"] - edit["drawn"] for edit in edits] == [4 * 8 // 2 * ROW] * 2
    for edit in edits:
        assert edit["tokens"] - edit["unused_at_end"] + edit["repeated_at_end"] == edit["drawn_at_end"]
    assert "the mixture is another one from step 9 on" in run.out  # type: ignore[attr-defined]


def test_without_an_edit_nothing_is_reported(mixed: Path, planned: Run, name: str) -> None:
    rewound(planned, name, 4)
    run = train(mixed, name, BOTH)
    assert run.curve == planned.curve
    assert run.events("mixture") == []


@pytest.mark.parametrize("layout", ["data2", "pipeline2"])
def test_another_layout_reads_the_same_mixture(mixed: Path, planned: Run, layout: str, name: str) -> None:
    rewound(planned, name, 4)
    overrides, world = LAYOUTS[layout]
    run = train(mixed, name, BOTH, *overrides, "data.workers=1", world=world)
    assert run.after_resume() == list(range(5, STEPS + 1))
    assert run.losses == pytest.approx(planned.losses, abs=1e-4)


def test_carried_state_is_mixed_by_streams(mixed: Path, name: str) -> None:
    carried = ("training.carry_state=true", "data.documents=packed", *SINGLE)
    whole = train(mixed, f"{name}-planned", BOTH, *carried)
    parts = train(mixed, f"{name}-first", FIRST, *carried)
    rewound(parts, name, 8)
    assert train(mixed, name, SECOND, *carried).curve == whole.curve


def test_one_dataset_becomes_part_of_a_mixture(mixed: Path, unbroken: Callable[[str], Run], name: str) -> None:
    """A run on a single dataset goes on with a second one; the first one's rows are not read again."""
    rewound(unbroken("single"), name, 8)
    run = train(mixed, name, SECOND)
    assert {step: run.losses[step] for step in range(1, 9)} == {
        step: unbroken("single").losses[step] for step in range(1, 9)
    }
    prose, code = run.events("mixture")
    assert (prose["source"], prose["drawn"]) == ("prose", 8 * STEP_TOKENS)
    assert (code["source"], code["drawn"]) == ("code", 0)


def test_another_dataset_under_the_old_name_is_refused(mixed: Path, first: Run, name: str) -> None:
    run = rewound(first, name, 8)
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.is_file()}
    changed = mixed / "data" / f"{name}-changed"
    shutil.copytree(mixed / "data" / "code", changed)
    card = json.loads((changed / "dataset.json").read_text())
    card["fingerprint"] = "0" * 64
    (changed / "dataset.json").write_text(json.dumps(card))
    sources = [word.replace("data/code", f"data/{name}-changed") for word in SOURCES]
    code, line = refusal(mixed, "train", *sources, FIRST, *SIZES, *SINGLE, f"name={name}")
    assert code == 4
    assert "code is not the dataset this run has read: its fingerprint is" in line
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.is_file()} == before
