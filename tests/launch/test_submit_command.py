"""`titans-dist submit`, `status`, `logs`, `cancel` and `requeue` with this machine as the scheduler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.launch import command_line
from tests.launch.command_line import Cli, environment
from tests.training.jobs import SINGLE, SIZES
from titans_dist.tracking import losses, read_metrics
from titans_launch.cli import main
from titans_launch.schedulers import snapshot

PREPARE = ["--command", "prepare", "data=text", "data.source=text", "data.tokenizer=bytes", "data.path=data/x"]
SOURCE = Path(snapshot.titans_dist.__file__).parents[1]


def wait_until(condition: Callable[[], object], timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=tests", "-c", "user.email=tests@example.org"]
    return subprocess.run(["git", *who, "-C", folder, *arguments], check=True, capture_output=True, text=True).stdout


def work_tree(folder: Path) -> Path:
    """A git work tree with the source code of this one, as a user may have it."""
    for part in ("titans_dist", "kernels", "launch", "data_pipeline", "configs"):
        shutil.copytree(SOURCE / part, folder / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(SOURCE / "pyproject.toml", folder)
    (folder / ".gitignore").write_text("__pycache__\nignored.py\n")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "all")
    return folder


def corpus(folder: Path) -> None:
    (folder / "text").mkdir()
    for number in range(3):
        (folder / "text" / f"{number}.txt").write_text(f"line {number}\n" * 100)


def test_a_dry_run_prints_and_writes_what_would_be_handed_in_and_starts_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", "--dry-run", "name=mine", "training.steps=7", "+cluster.environment.NCCL_DEBUG=a b"]) == 0
    out = capsys.readouterr().out
    folder = here / "runs" / "mine" / "submit"
    script = (folder / "job.sh").read_text()
    assert script in out
    assert "# runs/mine/submit/job.sh\n" in out and "# runs/mine/submit/config.yaml\n" in out
    assert "export NCCL_DEBUG='a b'\n" in script
    assert "titans_launch train " in script and "training.steps=7" in script
    assert yaml.safe_load((folder / "config.yaml").read_text())["training"]["steps"] == 7
    assert (folder / "config.yaml").read_text() in out
    assert not (folder / "submission.json").exists()
    assert not (here / "runs" / "mine" / "logs").exists()
    assert main(["status", "mine"]) == 1  # nothing was handed in


def test_what_cannot_work_is_refused_before_anything_is_written(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "name=mine", "parallel.tensor=2", "parallel.data=1", "cluster.processes_per_node=4"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("titans-dist: 4 processes do not fit parallel.tensor=2; use parallel.data=2")
    assert err.count("\n") == 1
    assert list(here.iterdir()) == []


def test_names_are_words_of_their_own_and_what_was_not_submitted_is_told(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("mine", "other"):
        (here / "runs" / name / "submit").mkdir(parents=True)
    (here / "runs" / "mine" / "submit" / "submission.json").write_text("{}")
    for command in ("status", "logs", "cancel", "requeue"):
        assert main([command, "other"]) == 1
        assert capsys.readouterr().err == "titans-dist: runs/other was not submitted; those that were: mine\n"
        assert main([command, "name=mine"]) == 1
        assert "submission.json does not say what was submitted" in capsys.readouterr().err


def test_the_copy_of_the_code_is_what_git_knows_and_what_is_not_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "tree"
    (tree / "titans_dist").mkdir(parents=True)
    (tree / "pyproject.toml").touch()
    for name in ("__init__.py", "kept.py", "deleted.py"):
        (tree / "titans_dist" / name).write_text("old = 1\n")
    (tree / ".gitignore").write_text("ignored.py\n")
    (tree / "notes").write_text("no code\n")
    git(tree, "init", "-q")
    git(tree, "add", "-A")
    git(tree, "commit", "-qm", "all")
    (tree / "titans_dist" / "kept.py").write_text("new = 2\n")
    (tree / "titans_dist" / "deleted.py").unlink()
    (tree / "titans_dist" / "with blank\n and line.py").write_text("untracked = 3\n")
    (tree / "titans_dist" / "ignored.py").write_text("no\n")
    monkeypatch.setattr(snapshot.titans_dist, "__file__", str(tree / "titans_dist" / "__init__.py"))
    run_dir = tmp_path / "run"
    code = snapshot.take(run_dir)
    assert code == run_dir / "submit" / "code"
    found = {path.name: path.read_text() for path in code.rglob("*") if path.is_file()}
    assert found == {"__init__.py": "old = 1\n", "kept.py": "new = 2\n", "with blank\n and line.py": "untracked = 3\n"}
    assert (run_dir / "submit" / "code.sha").read_text() == git(tree, "rev-parse", "HEAD")
    git(tree, "stash", "-q")  # what is tracked is the commit's again, and the difference makes it what it was
    git(tree, "apply", str(run_dir / "submit" / "code.diff"))
    assert (tree / "titans_dist" / "kept.py").read_text() == "new = 2\n"
    assert not (tree / "titans_dist" / "deleted.py").exists()


def test_where_there_is_no_work_tree_nothing_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site-packages" / "titans_dist").mkdir(parents=True)
    monkeypatch.setattr(snapshot.titans_dist, "__file__", str(tmp_path / "site-packages" / "titans_dist" / "x.py"))
    assert snapshot.take(tmp_path / "run") is None


@pytest.mark.slow
def test_the_job_runs_the_copy_whatever_becomes_of_the_work_tree_and_of_names(tmp_path: Path) -> None:
    tree, name = work_tree(tmp_path / "tree"), """it's 100% "mine", $HOME;x"""
    corpus(tmp_path)
    roots = os.pathsep.join(str(tree / root) for root in snapshot.ROOTS)
    variables = environment() | {"PYTHONPATH": roots}
    words = [sys.executable, "-m", "titans_launch", "submit", *PREPARE, f"name={json.dumps(name)}"]
    done = subprocess.run(words, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name == name
    log = run_dir / "logs" / "submit.log"
    wait_until(lambda: "tokenizer" in log.read_text())
    # The script that was handed in does the same once more, with its own code.
    shutil.rmtree(tree / "launch")
    shutil.rmtree(tmp_path / "data")
    again = subprocess.run(
        ["/bin/sh", run_dir / "submit" / "job.sh"], env=environment(), capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "data" / "x" / "dataset.json").exists()


@pytest.mark.slow
def test_the_life_of_a_job(cli: Cli, tmp_path: Path) -> None:
    own = ["data=synthetic", "data.vocab_size=320", *SIZES, *SINGLE, "training.steps=1000000", "name=mine"]
    metrics = tmp_path / "runs" / "mine" / "metrics.jsonl"

    def last() -> int:
        return max(losses(metrics), default=0) if metrics.exists() else 0

    submitted = cli("submit", *own)
    assert submitted.returncode == 0, submitted.stderr
    assert submitted.stdout.startswith("submitted runs/mine to local as ")
    try:
        wait_until(lambda: last() > 3)
        refused = cli("submit", *own)
        assert refused.returncode == 2
        assert refused.stderr.startswith("titans-dist: mine is running already as ")
        assert "RUNNING" in cli("status", "mine").stdout

        requeued = cli("requeue", "mine")
        assert requeued.returncode == 0, requeued.stderr
        stopped = last()
        wait_until(lambda: last() > stopped)
        assert cli("cancel", "mine").stdout.startswith("canceled mine (")
    finally:
        cli("cancel", "mine")
    rows = read_metrics(metrics)
    assert [row["step"] for row in rows if row.get("name") == "resume"] == [stopped]
    assert rows[-1]["name"] == "checkpoint" and rows[-1]["step"] == last()
    assert sorted(losses(metrics)) == list(range(1, last() + 1))
    shown = cli("status", "mine").stdout
    assert "ENDED" in shown and "interrupted" in shown and f"{last():,}" in shown
    assert cli("logs", "mine").stdout.count("stopped") == 2
    again = cli("cancel", "mine")
    assert again.returncode == 1
    assert again.stderr == "titans-dist: mine does not run any more, so there is nothing to cancel\n"


def test_a_job_of_the_command_line_that_trains_the_run_is_not_joined_by_another(cli: Cli, tmp_path: Path) -> None:
    from titans_dist.checkpoint.lease import Lease

    lease = Lease.acquire(tmp_path / "runs" / "mine" / "checkpoints")
    try:
        refused = command_line.run("submit", "name=mine", "--dry-run", cwd=tmp_path)
    finally:
        lease.release()
    assert refused.returncode == 4
    assert "is training this run" in refused.stderr
    assert not (tmp_path / "runs" / "mine" / "submit").exists()
