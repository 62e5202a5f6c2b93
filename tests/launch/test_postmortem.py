"""What an abnormal end leaves in the run's folder: enough to find the cause, and no secret."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.launch.command_line import Cli
from tests.launch.jobs import ONCE, TRAIN, foreign_torchrun
from titans_dist.run import postmortem
from titans_launch.attempts import Attempt, Report
from titans_launch.verdict import suspect

HOST = socket.gethostname()
SECRET = "0123456789abcdef"


def bundle(folder: Path) -> Path:
    """The only one there is."""
    (found,) = (path for path in (folder / "runs" / "run" / "postmortem").iterdir() if not path.is_symlink())
    return found


def report(folder: Path) -> dict[str, Any]:
    return json.loads((bundle(folder) / "report.json").read_text())


def everything(folder: Path) -> str:
    return "\n".join(path.read_text() for path in folder.rglob("*") if path.is_file())


def test_a_death_leaves_everything_there_is_to_know_in_one_folder(stubbed: Cli, tmp_path: Path) -> None:
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "config.yaml").write_text("name: run\n")
    run = stubbed(*TRAIN, *ONCE, "training.steps=300", STUB_FAIL="SIGKILL:1", STUB_STEP="205", NCCL_DEBUG="WARN")
    assert run.returncode == 1
    place = re.fullmatch(
        r"titans-dist: postmortem in (runs/run/postmortem/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d); "
        rf"rank 1 on {HOST} ended without a word \(SIGKILL: killed, or out of memory\)",
        run.stderr.splitlines()[-1],
    )
    assert place is not None
    folder = tmp_path / place[1]
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        *("README.txt", "report.json", "config.yaml", "metrics.jsonl", "environment.json"),
        *("logs/train-rank0.log", "logs/train-rank1.log", "logs/train-torchrun.log"),
        *("ranks/rank0.json", "ranks/rank1.json"),
    }
    facts = report(tmp_path)
    assert facts["exit_codes"] == {"0": 1, "1": -9}
    assert (facts["suspect"]["rank"], facts["suspect"]["host"]) == (1, HOST)
    assert facts["last_step"] == 205
    assert facts["ranks"][0]["text"] == "titans-dist: rank 1 is gone or stopped; rank 0 was in a collective"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 200
    assert rows[-1]["step"] == 205
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["host"] == HOST
    assert environment["versions"]["torch"]
    assert environment["variables"]["NCCL_DEBUG"] == "WARN"
    readme = (folder / "README.txt").read_text()
    assert f"Suspect:    rank 1 on {HOST} ended without a word" in readme
    assert "Last step:  205" in readme


def test_a_bug_leaves_the_stacks_of_its_rank(stubbed: Cli, tmp_path: Path) -> None:
    assert stubbed(*TRAIN, *ONCE, STUB_FAIL="bug:1", STUB_STEP="3").returncode == 1
    assert report(tmp_path)["suspect"] == {
        "rank": 1,
        "host": HOST,
        "why": "failed first: ZeroDivisionError: a bug in the program",
    }
    stacks = (bundle(tmp_path) / "logs" / "stacks-rank1.txt").read_text()
    assert "ZeroDivisionError: a bug in the program" in stacks
    assert "most recent call first" in stacks  # of the threads
    assert not (bundle(tmp_path) / "logs" / "stacks-rank0.txt").exists()


def test_stacks_of_an_earlier_job_are_left_out(stubbed: Cli, tmp_path: Path) -> None:
    assert stubbed(*TRAIN, *ONCE, STUB_FAIL="bug:1").returncode == 1
    assert stubbed(*TRAIN, *ONCE, STUB_FAIL="SIGKILL:1").returncode == 1
    newest = max((tmp_path / "runs" / "run" / "postmortem").iterdir())
    assert not (newest / "logs" / "stacks-rank1.txt").exists()


def test_no_secret_gets_in(stubbed: Cli, tmp_path: Path) -> None:
    run = stubbed(
        *(*TRAIN, *ONCE),
        STUB_FAIL="bug:1",
        STUB_SAY=f"logged in with {SECRET} at https://me:{SECRET}@there",
        WANDB_API_KEY=SECRET,
        SLURM_JWT=SECRET,
        SLURM_JOB_NAME="mine",
        MY_PRIVATE_WORDS="nobody's business",
    )
    assert run.returncode == 1
    assert SECRET in (tmp_path / "runs" / "run" / "logs" / "train-rank1.log").read_text()
    told = everything(bundle(tmp_path))
    assert SECRET not in told
    assert "nobody's business" not in told
    assert "logged in with *** at https://***@there" in told
    assert '"SLURM_JOB_NAME": "mine"' in told


@pytest.mark.parametrize("failure", ["ConfigError", "Interrupted"])
def test_what_is_no_accident_leaves_none(failure: str, stubbed: Cli, tmp_path: Path) -> None:
    assert stubbed(*TRAIN, STUB_FAIL=failure).returncode in (2, 3)
    assert not (tmp_path / "runs" / "run" / "postmortem").exists()


def test_a_postmortem_that_cannot_be_written_changes_no_exit_code(stubbed: Cli, tmp_path: Path) -> None:
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "postmortem").write_text("a file")
    run = stubbed(*TRAIN, STUB_FAIL="HealthError")
    assert run.returncode == 5
    sentence, why_not = run.stderr.splitlines()
    assert sentence == "titans-dist: a sentence from rank 0"
    assert why_not.startswith("titans-dist: no postmortem could be written: FileExistsError")


def test_under_a_foreign_torchrun_those_that_fail_make_it_together(tmp_path: Path) -> None:
    run = foreign_torchrun(tmp_path, STUB_FAIL="bug:1", STUB_STEP="3", WANDB_API_KEY=SECRET)
    assert run.returncode == 1
    said = re.findall(r"titans-dist: postmortem in .*", run.stderr)  # on the console, where rank 1's output is not
    place = bundle(tmp_path).relative_to(tmp_path)
    assert said == [
        f"titans-dist: postmortem in {place}; rank 1 on {HOST} failed first: ZeroDivisionError: a bug in the program"
    ]
    assert report(tmp_path)["exit_codes"] == {"0": 1, "1": 1}
    assert report(tmp_path)["suspect"]["rank"] == 1
    names = {path.name for path in (bundle(tmp_path) / "logs").iterdir()}
    assert names == {"train-rank1.log", "stacks-rank1.txt"}  # rank 0 speaks on the console
    assert SECRET not in everything(bundle(tmp_path))


def test_each_attempt_under_a_foreign_torchrun_has_its_own(tmp_path: Path) -> None:
    run = foreign_torchrun(tmp_path, restarts=1, STUB_FAIL="bug:1", STUB_STEP="3")
    assert run.returncode == 1
    folder = tmp_path / "runs" / "run" / "postmortem"
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("[0-9]*/report.json"))]
    assert [one["ranks"][0]["restart"] for one in reports] == [0, 1]


def test_the_newest_five_are_kept(tmp_path: Path) -> None:
    made = []
    for number in range(8):
        claim = f"job-{number}" if number % 2 else None
        folder, is_new = postmortem.open_bundle(tmp_path, claim)
        assert is_new or claim
        made.append(folder)
        (folder / "README.txt").touch()
    left = {path for path in (tmp_path / "postmortem").iterdir() if not path.is_symlink()}
    assert made[-1] in left
    assert len(left) <= 5


def test_all_of_one_job_get_the_same_folder(tmp_path: Path) -> None:
    first, is_first = postmortem.open_bundle(tmp_path, "job-1")
    second, is_second = postmortem.open_bundle(tmp_path, "job-1")
    assert first == second
    assert (is_first, is_second) == (True, False)


@pytest.mark.parametrize(
    ("content", "lines", "expected"),
    [
        ("", 2, ""),
        ("a\nb\nc\n", 2, "b\nc\n"),
        ("a\nb\nc", 2, "a\nb\nc"[2:]),
        ("a\n", 5, "a\n"),
        ("x" * 100, 5, "x" * 10),
        ("a\n" + "x" * 8 + "\n", 5, "x" * 8 + "\n"),
    ],
)
def test_the_end_of_a_file(content: str, lines: int, expected: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(content)
    assert postmortem.tail(tmp_path / "log", lines, max_bytes=10) == expected


def reported(rank: int, code: int, text: str, time: float, *, is_final: bool = False) -> Report:
    return Report(rank, 0, code, text, is_final, time, f"node{rank}")


@pytest.mark.parametrize(
    ("reports", "first", "expected"),
    [
        # The first to fail, not what followed from it.
        (
            [reported(0, 1, "titans-dist: rank 2 ended (bug); rank 0 was in x", 5.0), reported(2, 1, "bug", 4.0)],
            None,
            2,
        ),
        # The one that those name who are left; it says nothing itself.
        ([reported(0, 1, "titans-dist: rank 3 is gone or stopped; rank 0 was in x", 5.0)], None, 3),
        # What ends the whole job, whoever died of it before.
        ([reported(0, 1, "titans-dist: rank 1 is gone", 4.0), reported(1, 5, "nan", 5.0, is_final=True)], None, 1),
        # The one that torchrun saw die, although the others then had to be ended.
        ([], (1, -9), 1),
        ([reported(0, 1, "bug", 4.0)], (0, 1), 0),
    ],
)
def test_who_is_suspected(reports: list[Report], first: tuple[int, int] | None, expected: int, tmp_path: Path) -> None:
    begun = {} if first is None else {rank: 100 + rank for rank in range(4)}
    attempt = Attempt(0, begun=begun, reports={one.rank: one for one in reports}, first=first)
    found = suspect(attempt, tmp_path, "train")
    assert found is not None
    assert found.rank == expected


def test_last_words_of_a_worker_that_ended_itself_come_from_its_log(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "train-rank1.log").write_text("step 1\ntitans-dist: rank 0 hung in step 7\n")
    found = suspect(Attempt(0, begun={0: 100, 1: 101}, first=(1, 1)), tmp_path, "train")
    assert found is not None
    assert found.why == "ended itself: rank 0 hung in step 7"
