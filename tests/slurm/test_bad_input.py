"""What Slurm could not run is refused in one sentence before anything is submitted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.cluster_of_two import RANKS_2, SMALL, Cluster, slurm
from titans_launch.cli import main

pytestmark = pytest.mark.slurm

Captured = pytest.CaptureFixture[str]


def refusal(captured: Captured, *arguments: str) -> str:
    """The sentence with which `submit` refuses; it ends with 2 and hands nothing in."""
    waiting = slurm("squeue", "--noheader")
    assert main(["submit", *SMALL, "name=mine", *arguments]) == 2
    assert slurm("squeue", "--noheader") == waiting
    (line,) = captured.readouterr().err.splitlines()
    return line.removeprefix("titans-dist: ")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "cluster.queue=nosuch",
            "Slurm refuses the job: Invalid partition name specified; cluster.queue=nosuch, and there are main, grace, "
            "urgent",
        ),
        (
            "cluster.nodes=4",
            "Slurm refuses the job: Requested node configuration is not available; the job asks for cluster.nodes=4, "
            "and the partition has 2 with 4 CPUs, 200000 MB and gpu:2",
        ),
        (
            "cluster.slurm.constraint=h100",
            "Slurm refuses the job: Invalid feature specification; choose another cluster.slurm.constraint than h100",
        ),
        (
            "cluster.slurm.reservation=mine",
            "Slurm refuses the job: Requested reservation is invalid; choose another cluster.slurm.reservation than "
            "mine",
        ),
        (
            "cluster.slurm.exclude=n77",
            "Slurm refuses the job: Invalid node name specified; look at cluster.slurm.nodelist, cluster.slurm.exclude "
            "and exclude.txt in the run folder",
        ),
        (
            "cluster.slurm.extra=['--bogus']",
            "Slurm refuses the job: unrecognized option '--bogus'; look at cluster.slurm.extra",
        ),
        (
            "cluster.image=titans.sqsh",
            "cluster.image=titans.sqsh is not there; give the path of an image that all nodes see",
        ),
        (
            "submit.array=['training.seed=1','training.sede=2']",
            "task 1 of submit.array, 'training.sede=2': unknown key training.sede; did you mean training.seed? "
            "(titans-dist train --cfg job prints every key)",
        ),
        (
            "submit.array=['parallel.tensor=3']",
            "task 0 of submit.array, 'parallel.tensor=3': parallel.tensor=3 does not divide model.num_heads=4; "
            "the nearest legal parallel.tensor is 2",
        ),
        (
            "submit.array=['name=\"a']",
            "task 0 of submit.array, 'name=\"a': it has a quote that does not end; quote it as for a shell",
        ),
    ],
)
def test_what_the_cluster_does_not_have_is_refused(
    cluster: Cluster, folder: Path, capsys: Captured, override: str, sentence: str
) -> None:
    layout = ("parallel.tensor=1", "parallel.data=4") if "nodes" in override else ("parallel.tensor=1",)
    assert refusal(capsys, *layout, override) == sentence


def test_a_name_that_waits_or_runs_is_refused(cluster: Cluster, folder: Path, capsys: Captured) -> None:
    held = ("parallel.tensor=1", "cluster.slurm.extra=['--hold']")
    assert main(["submit", *SMALL, "name=mine", *held]) == 0
    number = slurm("squeue", "--noheader", "--format=%i").strip()
    capsys.readouterr()
    assert refusal(capsys, *held) == (
        f"mine is pending already as {number} of slurm; titans-dist cancel mine ends it, and another name= is another "
        "run"
    )
    assert main(["requeue", "mine"]) == 1
    assert capsys.readouterr().err == "titans-dist: mine waits already, so there is nothing to requeue\n"
    assert main(["cancel", "mine"]) == 0
    assert main(["cancel", "mine"]) == 1
    assert "mine does not run any more, so there is nothing to cancel" in capsys.readouterr().err


def test_a_job_may_wait_for_nodes_that_are_down(cluster: Cluster, folder: Path) -> None:
    slurm("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
    assert main(["submit", *SMALL, *RANKS_2, "name=mine"]) == 0


def test_a_chain_that_slurm_takes_only_a_part_of_is_taken_back(
    cluster: Cluster, folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = folder / "bin" / "sbatch"
    stand_in.parent.mkdir()
    stand_in.write_text(
        '#!/bin/sh\ncase "$*" in *afterany*) echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1 ;; esac\n'
        'exec /usr/bin/sbatch --hold "$@"\n'
    )
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", str(stand_in.parent), prepend=":")
    assert main(["submit", *SMALL, "parallel.tensor=1", "name=mine", "submit.chain=3"]) == 1
    assert "Slurm refuses the job: QOSMaxSubmitJobPerUserLimit; nothing was submitted" in capsys.readouterr().err
    assert slurm("squeue", "--noheader") == ""


def test_without_slurm_one_is_told_so(folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    assert main(["submit", *SMALL, "parallel.tensor=1", "name=mine"]) == 1
    assert capsys.readouterr().err == (
        "titans-dist: there is no sbatch on this machine, so Slurm cannot be asked; run this on a login node of the "
        "cluster, or use cluster=local\n"
    )
