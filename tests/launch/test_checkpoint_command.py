"""`titans-dist checkpoint`: what it says of the checkpoints of a run is what lies there."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.launch import command_line, runs
from tests.training.jobs import Run
from titans_dist.checkpoint.store import MANIFEST
from titans_dist.checkpoint.tensors import Tensors
from titans_launch.cli import main

Output = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return runs.trained(tmp_path_factory.mktemp("made"))


@pytest.fixture
def run(made: Run, here: Path) -> Run:
    """The run `mine` of the current folder, with checkpoints of steps 4, 8 and 12."""
    return runs.copied(made, here, "mine")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


HOLD = """
import sys, time, pathlib
from titans_dist.checkpoint.lease import Lease
Lease.acquire(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(100)
"""
"""A process that trains the run, as far as the lease goes."""


# ls


def test_ls_lists_what_is_committed_and_what_is_not(run: Run, capsys: Output) -> None:
    shutil.copytree(run.store.folder(12), run.store.root / "step_00000016.tmp")
    (run.store.folder(8) / MANIFEST).unlink()
    assert main(["checkpoint", "ls", "name=mine"]) == 0
    head, *table = runs.rows(capsys.readouterr().out)
    assert head == ["step", "saved", "size", "tokens", "loss", "processes", "state"]
    size = sum(path.stat().st_size for path in run.store.folder(12).iterdir() if path.name != MANIFEST)
    assert table[1][:2] + table[1][3:] == [
        "12",
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(runs.SAVED + 12)),
        f"{12 * 8 * 32:,}",
        f"{run.losses[12]:.4f}",
        "1 = tensor 1 x data 1, megatron, float32",
        "committed, newest",
    ]
    assert table[1][2] == f"{size / 1e6:.3g} MB"
    assert [row[-1] for row in table] == [
        "committed",
        "committed, newest",
        "leftover: step_00000008",
        "leftover: step_00000016.tmp",
    ]


def test_the_commands_start_no_process_group_and_need_no_data(run: Run) -> None:
    shutil.rmtree("data")
    for command in ("ls", "verify", "diff"):
        found = command_line.run("checkpoint", command, "name=mine", cwd=Path.cwd(), MASTER_ADDR="nowhere")
        assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize("command", ["ls", "verify", "diff", "prune"])
def test_a_run_without_checkpoints_is_refused(command: str, here: Path, capsys: Output) -> None:
    assert main(["checkpoint", command, "name=none"]) == 4
    assert capsys.readouterr().err == (
        "titans-dist: runs/none has no checkpoints; give the name=NAME of a run that has, or the overrides it was "
        "trained with\n"
    )
    assert not list(here.iterdir())


# verify


def test_verify_names_every_bad_file(run: Run, capsys: Output) -> None:
    assert main(["checkpoint", "verify", "name=mine"]) == 0
    count = len(list(run.store.folder(4).iterdir())) - 1
    assert [row for row in runs.rows(capsys.readouterr().out) if row[0] == "files"] == [
        ["files", f"{count} checked, 0 bad"]
    ] * 3
    flip(run.store.folder(4) / "__0_0.distcp")
    (run.store.folder(4) / "common.json").unlink()
    flip(run.store.folder(12) / "__0_0.distcp")
    with (run.store.folder(12) / ".metadata").open("ab") as file:
        file.write(b"x")
    (run.store.folder(8) / MANIFEST).write_text("{")
    assert main(["checkpoint", "verify", "name=mine"]) == 4
    printed = capsys.readouterr()
    said = printed.err.removeprefix("titans-dist: 5 files are not what the manifest says: ").split("; ")[0]
    bad = ["step_00000004/__0_0.distcp", "step_00000004/common.json"]
    bad += ["step_00000012/__0_0.distcp", "step_00000012/.metadata"]
    assert sorted(said.split(", ")) == sorted(f"runs/mine/checkpoints/{name}" for name in ["step_00000008", *bad])
    assert printed.out.count("does not have the sha256 in the manifest") == 2
    assert "is missing" in printed.out and "no readable manifest" in printed.out


def test_verify_looks_at_one_step_alone(run: Run, capsys: Output) -> None:
    flip(run.store.folder(4) / "__0_0.distcp")
    assert main(["checkpoint", "verify", "name=mine", "--step", "8"]) == 0
    assert main(["checkpoint", "verify", "name=mine", "--step=4"]) == 4
    capsys.readouterr()
    assert main(["checkpoint", "verify", "name=mine", "--step=5"]) == 4
    assert capsys.readouterr().err == (
        "titans-dist: runs/mine/checkpoints has no checkpoint of step 5; there is one of step 4, 8, 12\n"
    )


def test_a_save_cut_short_is_told_of_and_not_bad(run: Run, capsys: Output) -> None:
    shutil.copytree(run.store.folder(12), run.store.root / "step_00000016.tmp")
    assert main(["checkpoint", "verify", "name=mine"]) == 0
    assert "the leftover of a save that did not end" in capsys.readouterr().out


# diff


def test_diff_measures_every_tensor(run: Run, capsys: Output) -> None:
    assert main(["checkpoint", "diff", "name=mine", "--step", "4", "--to-step", "12"]) == 0
    printed = capsys.readouterr().out
    before, after = Tensors(run.store.folder(4)), Tensors(run.store.folder(12))
    table = {row[0]: row[1:] for row in runs.rows(printed) if row[0] in before.names}
    weight = after.read("embedding.weight").double() - before.read("embedding.weight").double()
    expected = [f"{weight.abs().max():.3e}", f"{weight.norm() / before.read('embedding.weight').double().norm():.3e}"]
    assert weight.abs().max() > 0
    assert table["embedding.weight"] == expected
    weights = [name for name in before.names if not name.startswith(("optimizer.", "rng."))]
    assert list(table)[:3] == sorted(table, key=lambda name: (name not in weights, -float(table[name][1])))[:3]
    assert f"of {len(before.names)} tensors are equal" in printed
    told = {row[0]: row[1:] for row in runs.rows(printed) if row[0] in ("tokens", "loss", "data.sources.0.drawn")}
    assert told == {
        "tokens": ["1024", "3072"],
        "loss": [str(run.losses[4]), str(run.losses[12])],
        "data.sources.0.drawn": ["32", "96"],
    }


def test_diff_of_two_runs_finds_the_one_tensor_that_differs(run: Run, made: Run, here: Path, capsys: Output) -> None:
    other = runs.copied(made, here, "other")
    runs.tell(other.store, 12, note="another")
    name = "blocks.1.mlp.down.weight"
    written = other.store.folder(12) / "__0_0.distcp"
    value = Tensors(other.store.folder(12)).read(name)
    content = written.read_bytes()
    place = content.index(value.numpy().tobytes())
    changed = value.clone()
    changed[0, 0] += 1
    written.write_bytes(content[:place] + changed.numpy().tobytes() + content[place + changed.nbytes :])
    assert torch.equal(Tensors(other.store.folder(12)).read(name), changed)
    for path in ("runs/other", "runs/other/checkpoints"):
        assert main(["checkpoint", "diff", "name=mine", "--path", path]) == 0
        table = runs.rows(capsys.readouterr().out)
        assert [row for row in table if row[0] == "note"] == [["note", "", '"another"']]
        assert [row[:2] for row in table if row[0].startswith("blocks.")] == [[name, "1.000e+00"]]


def test_diff_names_tensors_of_one_alone_and_of_another_shape(run: Run, here: Path, capsys: Output) -> None:
    runs.finish(here, "train", *runs.OVERRIDES, "name=wider", "model.num_layers=1", "model.vocab_size=384")
    assert main(["checkpoint", "diff", "name=mine", "export.path=runs/wider"]) == 0
    table = {row[0]: row[1] for row in runs.rows(capsys.readouterr().out)}
    assert table["embedding.weight"] == "of shape (320, 32) and (384, 32)"
    assert table["blocks.1.mlp.down.weight"] == "only in the first"


def test_diff_needs_two(run: Run, capsys: Output) -> None:
    assert main(["checkpoint", "diff", "name=mine", "--step=12"]) == 2
    assert "both are step 12; name two steps" in capsys.readouterr().err
    for step in (4, 8):
        shutil.rmtree(run.store.folder(step))
    assert main(["checkpoint", "diff", "name=mine"]) == 4
    assert "has 1 checkpoints, and two are compared" in capsys.readouterr().err


def test_an_index_that_would_run_code_is_refused(run: Run, capsys: Output) -> None:
    (run.store.folder(12) / ".metadata").write_bytes(b"cposix\nsystem\n(S'touch pwned'\ntR.")
    assert main(["checkpoint", "diff", "name=mine"]) == 4
    assert "asks for posix.system, which is no part of a checkpoint's index" in capsys.readouterr().err
    assert not Path("pwned").exists()


# prune


def fates(printed: str) -> dict[str, str]:
    return {row[0]: row[1] for row in runs.rows(printed) if row[0].startswith("step ")}


def test_prune_says_what_it_would_remove_and_removes_it(run: Run, made: Run, here: Path, capsys: Output) -> None:
    for step in (14, 16, 18):
        shutil.copytree(run.store.folder(12), run.store.folder(step))
        runs.change_manifest(run.store.folder(step), step=step)
    runs.change_manifest(run.store.folder(8), permanent=True)
    everything = [4, 8, 12, 14, 16, 18]
    assert run.store.committed() == everything
    expected = {
        "step 4": "removed",
        "step 8": "stays, permanent",
        "step 12": "removed",
        "step 14": "removed",
        "step 16": "stays, one of the newest",
        "step 18": "stays, one of the newest",
    }
    assert main(["checkpoint", "prune", "--dry-run", "name=mine", "checkpoint.keep=2"]) == 0
    printed = capsys.readouterr().out
    assert fates(printed) == {step: fate.replace("removed", "would be removed") for step, fate in expected.items()}
    assert "in 3 of 6 checkpoints would be removed" in printed
    assert run.store.committed() == everything
    assert main(["checkpoint", "prune", "name=mine", "checkpoint.keep=2"]) == 0
    assert fates(capsys.readouterr().out) == expected
    assert run.store.committed() == [8, 16, 18]


def test_prune_keeps_the_newest_that_is_whole(run: Run, capsys: Output) -> None:
    for step in (8, 12):
        flip(run.store.folder(step) / "__0_0.distcp")
    assert main(["checkpoint", "prune", "name=mine", "checkpoint.keep=2"]) == 0
    assert fates(capsys.readouterr().out)["step 4"] == "stays, the newest that is whole"
    assert run.store.committed() == [4, 8, 12]


def test_prune_leaves_a_run_alone_that_is_being_trained(run: Run, capsys: Output) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run.store.root)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert main(["checkpoint", "prune", "name=mine", "checkpoint.keep=2"]) == 4
        assert main(["checkpoint", "prune", "--dry-run", "name=mine", "checkpoint.keep=2"]) == 0
        holder.kill()
    assert f"process {holder.pid} on " in capsys.readouterr().err
    assert run.store.committed() == [4, 8, 12]
    assert main(["checkpoint", "prune", "name=mine", "checkpoint.keep=2"]) == 0
    assert run.store.committed() == [8, 12]


# Flags


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("verify --step", "--step has no value; write --step VALUE or inspect.step=VALUE"),
        ("diff --step --to-step 3", "--step has no value; write --step VALUE or inspect.step=VALUE"),
        ("verify --step four", "inspect.step=four is not a whole number or null"),
        ("ls --step 4", "unrecognized arguments: --step"),
    ],
)
def test_a_flag_that_is_wrong_is_one_sentence(words: str, sentence: str, here: Path, capsys: Output) -> None:
    assert main(["checkpoint", words.split()[0], "name=mine", *words.split()[1:]]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"titans-dist: {sentence}")
    assert error.count("\n") == 1


def test_a_flag_is_the_key_it_stands_for(here: Path, capsys: Output) -> None:
    assert main(["checkpoint", "diff", "--step", "4", "--path=a, b's=c", "--to-step=9", "--cfg", "job"]) == 0
    printed = capsys.readouterr().out
    assert "step: 4\n  to_step: 9\n" in printed
    assert "path: a, b's=c\n" in printed
