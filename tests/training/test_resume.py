"""A run that was killed, stopped or moved to another layout goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.launch import command_line
from tests.training.conftest import LAYOUTS, rewound
from tests.training.jobs import SINGLE, SIZES, STEPS, TENSOR_2, TEXT, Run, finish, job, wait_until
from tests.training.moments import Before, at_steps, hold_before_step, hold_in_save
from titans_launch.processes import kill_tree

TRAIN = ("train", *TEXT, *SIZES, *TENSOR_2)
Unbroken = Callable[[str], Run]
StoppedAt = Callable[[int], Run]


class Started:
    """`titans-dist train` as a user starts it, with its launcher, torchrun and workers."""

    def __init__(self, home: Path, name: str) -> None:
        self.run = Run(home / "runs" / name)
        self.process = subprocess.Popen(
            command_line.command(*TRAIN, f"name={name}"),
            cwd=home,
            env=command_line.environment(CUDA_VISIBLE_DEVICES=""),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for_step(self, step: int) -> None:
        """Poll until this step is in metrics.jsonl."""
        wait_until(
            lambda: step in self.run.steps, lambda: self.process.poll() is None, lambda: self.process.communicate()
        )

    def worker(self, rank: int) -> psutil.Process:
        """The process of one rank."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        (found,) = [process for process in below if process.environ().get("RANK") == str(rank)]
        return found

    def end(self) -> tuple[int, str]:
        """Exit code, and what was said on stderr."""
        _, err = self.process.communicate(timeout=100)
        return self.process.returncode, err


# Killed


def test_the_main_job_killed_half_way_ends_as_if_it_had_not_been(home: Path, unbroken: Unbroken) -> None:
    started = Started(home, "main")
    started.wait_for_step(5)
    kill_tree(started.process.pid)
    assert started.end()[0] == -signal.SIGKILL
    run = started.run
    trained = run.steps
    assert 5 <= trained[-1] < STEPS
    assert run.status == "running"

    again = command_line.run(*TRAIN, "name=main", cwd=home, CUDA_VISIBLE_DEVICES="")
    assert (again.returncode, again.stderr) == (0, "")
    (resume,) = run.events("resume")
    assert resume["step"] in (4, 8)
    assert run.steps == trained + list(range(resume["step"] + 1, STEPS + 1))
    assert run.curve == unbroken("tensor2").curve
    assert last_weights(run) == last_weights(unbroken("tensor2"))
    assert run.status == "done"


def last_weights(run: Run) -> dict[str, str]:
    """File -> SHA-256 of the tensors of the last checkpoint: weights and moments of every rank."""
    run.store.verify(STEPS)
    manifest = json.loads((run.store.folder(STEPS) / "manifest.json").read_text())
    files = {name: entry["sha256"] for name, entry in manifest["files"].items() if name.endswith(".distcp")}
    assert files
    return files


@pytest.mark.parametrize(
    ("layout", "before", "last", "checkpoint"),
    [
        pytest.param("tensor2", hold_before_step(5), 4, 4, id="tensor2, just after a checkpoint"),
        pytest.param("tensor2", hold_before_step(7), 6, 4, id="tensor2, between two checkpoints"),
        pytest.param("tensor2", hold_in_save(8), 8, 4, id="tensor2, while it saves"),
        pytest.param("data2", hold_before_step(7), 6, 4, id="data2, between two checkpoints"),
        pytest.param("pipeline2", hold_before_step(7), 6, 4, id="pipeline2, between two checkpoints"),
        pytest.param("context2", hold_before_step(7), 6, 4, id="context2, between two checkpoints"),
    ],
)
def test_every_loss_is_bit_equal_after_a_kill(
    layout: str, before: Before, last: int, checkpoint: int, home: Path, unbroken: Unbroken, name: str
) -> None:
    overrides, world = LAYOUTS[layout]
    train = ("train", *TEXT, *SIZES, *overrides, f"name={name}")
    run = Run(home / "runs" / name)
    cuts_short = last == 8
    with job(home, *train, world=world, before=before) as killed:
        if cuts_short:
            killed.wait_until(lambda: any(run.store.root.glob("step_00000008.*.tmp/metadata.json")))
        else:
            killed.wait_until(lambda: last in run.steps and run.store.committed() == [checkpoint])
        killed.kill()
        assert killed.wait() == [-signal.SIGKILL] * world
    assert run.steps == list(range(1, last + 1))
    assert run.store.committed() == [checkpoint]
    leftovers = [str(path) for path in run.store.leftovers()]

    resumed = finish(home, *train, world=world)
    assert [row["step"] for row in run.events("resume")] == [checkpoint]
    assert run.after_resume() == list(range(checkpoint + 1, STEPS + 1))
    assert run.curve == unbroken(layout).curve
    assert last_weights(run) == last_weights(unbroken(layout))
    assert run.status == "done"
    warnings = [line for line in resumed.out.splitlines() if "leftover" in line]
    assert len(warnings) == len(leftovers) == (1 if cuts_short else 0)
    assert all(path in line for path, line in zip(leftovers, warnings, strict=True))


def test_saving_beside_training_changes_nothing(home: Path, name: str, unbroken: Unbroken) -> None:
    finish(home, *TRAIN, "checkpoint.asynchronous=true", "checkpoint.interval=1", f"name={name}", world=2)
    run = Run(home / "runs" / name)
    assert run.curve == unbroken("tensor2").curve
    assert last_weights(run) == last_weights(unbroken("tensor2"))
    assert len(run.events("checkpoint")) >= 2


def test_bfloat16_with_its_master_weights_goes_on_bit_equal_too(home: Path, name: str) -> None:
    train = (*TRAIN, "training.precision=bfloat16")
    finish(home, *train, f"name={name}-unbroken", world=2)
    unbroken = Run(home / "runs" / f"{name}-unbroken")
    run = rewound(unbroken, name, 4)
    finish(home, *train, f"name={name}", world=2)
    assert run.after_resume() == list(range(5, STEPS + 1))
    assert run.curve == unbroken.curve
    assert last_weights(run) == last_weights(unbroken)


def test_a_run_that_is_done_says_so_and_trains_nothing(home: Path, stopped_at: StoppedAt) -> None:
    run = stopped_at(STEPS)
    rows = run.rows
    again = finish(home, *TRAIN, f"name={run.folder.name}", world=2)
    assert f"{run.folder} is done: {STEPS} of {STEPS} steps" in again.out
    assert [row for row in run.rows if row["kind"] == "train"] == [row for row in rows if row["kind"] == "train"]
    assert run.status == "done"


# Layouts


@pytest.mark.parametrize("layout", ["tensor2", "data2", "pipeline2", "context2"])
def test_the_losses_of_a_layout_are_those_of_one_process(layout: str, unbroken: Unbroken) -> None:
    one = unbroken("single").losses
    assert list(one) == list(range(1, STEPS + 1))
    assert one[STEPS] < one[1] - 0.3  # it learns, so that equal losses mean equal training
    assert unbroken(layout).losses == pytest.approx(one, abs=1e-4)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "tensor2"])
def test_a_run_of_two_tensor_parallel_processes_goes_on_on_another_layout(
    layout: str, home: Path, stopped_at: StoppedAt, unbroken: Unbroken
) -> None:
    run = stopped_at(8)
    overrides, world = LAYOUTS[layout]
    finish(home, "train", *TEXT, *SIZES, *overrides, f"name={run.folder.name}", world=world)
    assert run.after_resume() == list(range(9, STEPS + 1))
    assert run.losses == pytest.approx(unbroken("single").losses, abs=1e-4)


def test_a_run_in_stages_goes_on_in_one_process(home: Path, unbroken: Unbroken, name: str) -> None:
    run = rewound(unbroken("pipeline2"), name, 4)
    finish(home, "train", *TEXT, *SIZES, *SINGLE, f"name={name}", world=1)
    assert run.after_resume() == list(range(5, STEPS + 1))
    assert run.losses == pytest.approx(unbroken("single").losses, abs=1e-4)


def test_all_stages_tell_of_their_memories(unbroken: Unbroken) -> None:
    told = [[row for row in unbroken(layout).rows if row["kind"] == "memory"] for layout in ("single", "pipeline2")]
    assert [row["step"] for row in told[0]] == [row["step"] for row in told[1]] == [10]
    one, staged = (rows[0]["layers"] for rows in told)
    assert list(one) == list(staged) == ["blocks.0.mixer.memory.memory", "blocks.1.mixer.memory.memory"]
    for path in one:
        assert staged[path]["w_norm"] == pytest.approx(one[path]["w_norm"], rel=1e-4)


# Checkpoints cut short


def test_a_checkpoint_cut_short_is_named_and_the_one_before_it_taken(
    home: Path, stopped_at: StoppedAt, unbroken: Unbroken
) -> None:
    run = stopped_at(8)
    damaged = run.store.folder(8) / "__1_0.distcp"
    size_bytes = damaged.stat().st_size
    os.truncate(damaged, size_bytes // 2)
    resumed = finish(home, *TRAIN, f"name={run.folder.name}", world=2)
    (warning,) = [line for line in resumed.out.splitlines() if "damaged" in line]
    assert warning == (
        f"checkpoint {run.store.folder(8)} is damaged: __1_0.distcp has {size_bytes // 2} bytes "
        f"instead of {size_bytes}; trying the one before it"
    )
    assert run.after_resume() == list(range(5, STEPS + 1))
    assert run.curve == unbroken("tensor2").curve
    run.store.verify(8)  # trained again, and saved over the damaged one


def test_a_folder_of_a_save_that_never_ended_is_named_and_ignored(
    home: Path, stopped_at: StoppedAt, unbroken: Unbroken
) -> None:
    run = stopped_at(8)
    leftover = run.store.folder(12).with_suffix(".tmp")
    shutil.copytree(run.store.folder(8), leftover)
    resumed = finish(home, *TRAIN, f"name={run.folder.name}", world=2)
    (warning,) = [line for line in resumed.out.splitlines() if "leftover" in line]
    assert warning.startswith(f"{leftover} is the leftover of an interrupted save")
    assert run.after_resume() == list(range(9, STEPS + 1))
    assert run.curve == unbroken("tensor2").curve
    assert run.store.leftovers() == []


# Signals


def check_stopped_and_resumed(started: Started, home: Path, unbroken: Unbroken) -> None:
    code, err = started.end()
    run = started.run
    last = run.steps[-1]
    assert code == 3
    assert err.startswith("titans-dist: stopped by ") and err.endswith(f" after step {last}, which is saved\n")
    assert err.count("\n") == 1
    assert 2 <= last < STEPS
    assert run.status == "interrupted"
    assert run.store.committed()[-1] == last
    finish(home, *TRAIN, f"name={run.folder.name}", world=2)
    assert run.after_resume() == list(range(last + 1, STEPS + 1))
    assert run.curve == unbroken("tensor2").curve
    assert run.status == "done"


def test_sigterm_to_the_launcher_saves_and_the_run_goes_on_later(home: Path, unbroken: Unbroken) -> None:
    started = Started(home, "stopped-launcher")
    started.wait_for_step(2)
    started.process.terminate()
    check_stopped_and_resumed(started, home, unbroken)


def test_sigterm_to_one_worker_saves_on_all_and_the_run_goes_on_later(home: Path, unbroken: Unbroken) -> None:
    started = Started(home, "stopped-worker")
    started.wait_for_step(2)
    started.worker(1).terminate()
    check_stopped_and_resumed(started, home, unbroken)


def test_all_ranks_stop_after_the_same_step_whichever_got_the_signal(home: Path, name: str) -> None:
    run = Run(home / "runs" / name)
    sigterm = at_steps({3: lambda rank: signal.raise_signal(signal.SIGTERM) if rank == 1 else None})
    whole = "training.micro_batch_size=8"  # nothing to stop between inside a step, however long it takes
    with job(home, *TRAIN, whole, f"name={name}", world=2, before=sigterm) as stopped:
        assert stopped.wait() == [3, 3]
    said = "titans-dist: stopped by SIGTERM after step 3, which is saved"
    assert stopped.err == said + "\n"
    assert (run.folder / "logs" / "train-rank1.log").read_text().splitlines()[-1] == said
    assert run.steps == [1, 2, 3]
    assert run.store.committed() == [3]
    assert run.status == "interrupted"
