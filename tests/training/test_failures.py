"""What goes wrong is said in one sentence with its exit code, and costs no checkpoint."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.conftest import rewound
from tests.training.jobs import SINGLE, SIZES, STEPS, TENSOR_2, TEXT, Run, finish, job, refusal
from tests.training.moments import at_steps, full_disk

TRAIN = ("train", *TEXT, *SIZES, *TENSOR_2)
ASYNCHRONOUS = "checkpoint.asynchronous=true"
Unbroken = Callable[[str], Run]
StoppedAt = Callable[[int], Run]


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path and content of every file of a run but its logs."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "logs"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# A full disk


def test_a_full_disk_is_reported_and_training_goes_on(home: Path, name: str, unbroken: Unbroken) -> None:
    run = Run(home / "runs" / name)
    once = "checkpoint.retries=0"
    done = finish(home, *TRAIN, once, f"name={name}", world=2, before=full_disk(rank=1, first=7, last=10))
    (failure,) = run.events("save_failed")
    assert failure["step"] == 8
    assert failure["error"].startswith("cannot save step 8: rank 1: ") and "File too large" in failure["error"]
    assert f"save failed | step 8 | attempts 1 | error {failure['error']}\n" in done.out
    assert [row["step"] for row in run.events("checkpoint")] == [4, 12]
    assert run.store.committed() == [4, 12]
    assert run.store.leftovers() == []
    for step in (4, 12):
        run.store.verify(step)
    assert run.curve == unbroken("tensor2").curve
    assert run.status == "done"


def test_a_save_is_tried_again_while_training_goes_on(home: Path, name: str, unbroken: Unbroken) -> None:
    """The disk is full for some steps; what was to be saved then is saved later, as it was."""
    run = Run(home / "runs" / name)
    slow = full_disk(rank=1, first=3, last=6)

    def before(rank: int) -> None:
        slow(rank)
        at_steps({step: lambda _: time.sleep(0.4) for step in range(5, 12)})(rank)

    finish(home, *TRAIN, ASYNCHRONOUS, f"name={name}", world=2, before=before)
    first = run.events("checkpoint")[0]
    assert first["step"] == 4 and first["attempts"] > 1
    assert run.events("save_failed") == []
    again = rewound(run, f"{name}-again", 4)
    finish(home, *TRAIN, f"name={name}-again", world=2)
    assert again.curve == run.curve == unbroken("tensor2").curve


def test_with_strict_a_failed_save_ends_the_run_on_all_ranks(home: Path, name: str) -> None:
    run = Run(home / "runs" / name)
    strict = (ASYNCHRONOUS, "checkpoint.strict=true", "checkpoint.retries=0", f"name={name}")
    with job(home, *TRAIN, *strict, world=2, before=full_disk(rank=1, first=7, last=STEPS)) as failed:
        assert failed.wait() == [1, 1]
    assert "cannot save step 8: rank 1: " in failed.err and "and checkpoint.strict=true" in failed.err
    assert 8 <= run.steps[-1] <= STEPS
    assert run.store.committed() == [4]
    assert run.status == "interrupted"


def test_a_run_whose_last_step_cannot_be_saved_is_not_done(home: Path, stopped_at: StoppedAt) -> None:
    run = stopped_at(8)
    train = (*TRAIN, f"name={run.folder.name}")
    with job(home, *train, world=2, before=full_disk(rank=0, first=1, last=STEPS)) as unsaved:
        assert unsaved.wait() == [1, 1]
    assert unsaved.err == (
        "titans-dist: stopped after step 12, which could not be saved; the earlier checkpoints are sound: "
        "make room and start again to go on from the newest\n"
    )
    assert run.status == "interrupted"
    assert run.store.committed() == [4, 8]
    finish(home, *train, world=2)
    assert run.after_resume() == [9, 10, 11, 12]
    assert run.store.committed() == [4, 8, 12]
    assert run.status == "done"


def test_a_stop_that_cannot_be_saved_does_not_claim_to_be(home: Path, stopped_at: StoppedAt) -> None:
    run = stopped_at(8)

    def full_disk_then_sigterm(rank: int) -> None:
        full_disk(rank=0, first=1, last=STEPS)(rank)
        at_steps({2: lambda here: signal.raise_signal(signal.SIGTERM)})(rank)

    whole = "training.micro_batch_size=8"  # nothing to stop between inside a step, however long it takes
    with job(home, *TRAIN, whole, f"name={run.folder.name}", world=2, before=full_disk_then_sigterm) as unsaved:
        assert unsaved.wait() == [1, 1]
    assert "titans-dist: stopped after step 10, which could not be saved" in unsaved.err
    assert "which is saved" not in unsaved.err
    assert run.status == "interrupted"
    assert run.store.committed() == [4, 8]


# Numbers that must not be trained on


def test_the_next_start_may_have_another_learning_rate(home: Path, stopped_at: StoppedAt, unbroken: Unbroken) -> None:
    run = stopped_at(4)
    train = (*TRAIN, f"name={run.folder.name}")
    at_once = ("health.skips=0", "health.lower_lr=1", "health.rollbacks=0")
    assert refusal(home, *train, *at_once, "optimizer.lr=1e9", world=2)[0] == 5
    assert 4 < run.after_resume()[-1] < 8
    assert run.store.committed() == [4]
    finish(home, *train, world=2)
    assert run.after_resume() == list(range(5, STEPS + 1))
    assert run.curve == unbroken("tensor2").curve


# Another run under the same name


def test_another_model_under_the_same_name_is_refused_and_changes_nothing(home: Path, unbroken: Unbroken) -> None:
    run = unbroken("tensor2")
    before = contents(run.folder)
    code, line = refusal(home, *TRAIN, "model.num_layers=3", "name=tensor2", world=2)
    assert code == 4
    assert line == (
        f"titans-dist: {run.folder} holds another run: model.num_layers=3 (it was 2); "
        "give this one its own name=NAME or use the old values"
    )
    assert contents(run.folder) == before


# What cannot begin


def test_data_of_a_larger_vocabulary_than_the_model_is_refused(home: Path, name: str) -> None:
    code, line = refusal(home, "train", *TEXT, *SIZES, *SINGLE, "model.vocab_size=256", f"name={name}")
    assert code == 2
    assert "the data has 257 token ids but model.vocab_size=256; use model.vocab_size=320" in line
    assert not (home / "runs" / name).exists()


def test_missing_data_is_named(home: Path, name: str) -> None:
    code, line = refusal(home, "train", *TEXT, *SIZES, *SINGLE, "data.path=data/nowhere", f"name={name}")
    assert code == 4
    assert "data/nowhere is not a folder" in line
    assert not (home / "runs" / name).exists()


@pytest.mark.parametrize("damage", ["removed", "cut short"])
def test_a_damaged_shard_is_named_and_the_run_stays_as_it_is(
    damage: str, home: Path, unbroken: Unbroken, tmp_path: Path
) -> None:
    run = unbroken("tensor2")
    before = contents(run.folder)
    shutil.copytree(home / "data" / "bytes", tmp_path / "bytes")
    (shard,) = (tmp_path / "bytes" / "train").rglob("*.mds")
    if damage == "removed":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-1])
    code, line = refusal(home, *TRAIN, f"data.path={tmp_path / 'bytes'}", "name=tensor2", world=2)
    assert code == 4
    assert str(shard) in line
    assert contents(run.folder) == before


def test_a_number_of_processes_that_does_not_fit_the_layout_is_refused(home: Path, name: str) -> None:
    code, line = refusal(home, "train", *TEXT, *SIZES, "parallel.tensor=4", f"name={name}", world=2)
    assert code == 2
    assert line == "titans-dist: 2 processes do not fit parallel.tensor=4; use a multiple of 4 processes"
    code, line = refusal(home, "train", *TEXT, *SIZES, "parallel.tensor=2", "parallel.data=2", f"name={name}", world=2)
    assert code == 2
    assert line == "titans-dist: 2 processes do not fit parallel.tensor=2 x parallel.data=2; use parallel.data=1"
