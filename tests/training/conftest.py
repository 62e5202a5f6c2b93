"""One dataset and one unbroken run per layout, for all tests of this folder."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch import command_line
from tests.training.jobs import (
    CONTEXT_2,
    DATA_2,
    PIPELINE_2,
    SINGLE,
    SIZES,
    TENSOR_2,
    TEXT,
    Run,
    corpus,
    finish,
)

LAYOUTS = {
    "tensor2": (TENSOR_2, 2),
    "data2": (DATA_2, 2),
    "pipeline2": (PIPELINE_2, 2),
    "context2": (CONTEXT_2, 2),
    "tensor2 x pipeline2": ((*TENSOR_2, *PIPELINE_2[1:]), 4),
    "single": (SINGLE, 1),
}
"""Name -> overrides and number of processes."""


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The current folder of all jobs, with a corpus that `titans-dist prepare` has prepared."""
    folder = tmp_path_factory.mktemp("home")
    corpus(folder / "text")
    prepared = command_line.run("prepare", *TEXT, cwd=folder)
    assert prepared.returncode == 0, prepared.stderr
    assert (folder / "data" / "bytes" / "dataset.json").exists()
    return folder


@pytest.fixture(scope="session")
def unbroken(home: Path) -> Callable[[str], Run]:
    """unbroken("tensor2") is the run of that layout that nothing ever disturbed."""
    runs: dict[str, Run] = {}

    def run(layout: str) -> Run:
        if layout not in runs:
            overrides, world = LAYOUTS[layout]
            finish(home, "train", *TEXT, *SIZES, *overrides, f"name={layout}", world=world)
            runs[layout] = Run(home / "runs" / layout)
        return runs[layout]

    return run


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name for the run of this test that no other run has."""
    return re.sub(r"\W+", "-", request.node.name).strip("-")


@pytest.fixture
def stopped_at(unbroken: Callable[[str], Run], name: str) -> Callable[[int], Run]:
    """stopped_at(8) is a run of its own, named like the test, that stopped after its checkpoint at step 8."""

    return lambda step: rewound(unbroken("tensor2"), name, step)


def rewound(source: Run, name: str, step: int) -> Run:
    """A copy of a run that is done, named `name`, as it was after its checkpoint at `step`."""
    run = Run(source.folder.with_name(name))
    shutil.copytree(source.folder, run.folder)
    for later in [saved for saved in run.store.committed() if saved > step]:
        shutil.rmtree(run.store.folder(later))
    rows = [row for row in source.rows if row["step"] <= step]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run.store.committed()[-1] == step
    return run
