"""`titans-dist quickstart`: what `make train` shows, with a stand-in for the training loop."""

from __future__ import annotations

import re
from pathlib import Path

import psutil
import pytest

from tests.launch.command_line import Cli
from titans_dist.config import UserError
from titans_launch import quickstart

OVERRIDES = ["data=synthetic", "training.steps=40", "checkpoint.interval=10", "name=demo"]


def train(step: int, loss: float = 1.0) -> dict:
    return {"kind": "train", "step": step, "loss": loss, "tokens_per_s": 100.0 * step}


def checkpoint(step: int) -> dict:
    return {"kind": "event", "name": "checkpoint", "step": step}


def test_the_whole_way(stubbed: Cli, tmp_path: Path) -> None:
    run = stubbed("quickstart", *OVERRIDES)
    assert run.returncode == 0, run.stderr + run.stdout
    table = dict(re.findall(r"│ (.+?) +│ (.+?) +│", run.stdout.split("trained, killed, resumed, evaluated")[1]))
    killed_at = int(table["before the kill"].split()[-1])
    assert killed_at >= 20
    resumed_at, saved_at = re.findall(r"at step (\d+), checkpoint (\d+)", table["after the resume"])[0]
    assert int(resumed_at) == int(saved_at) + 1 <= killed_at
    assert table["loss at start"] == "4.0000   (even guessing: ln 4096 = 8.3178)"
    assert table["loss at the end"] == f"{8 / 41:.4f}   at step 40"
    assert table["held-out loss"] == "2.5000   bits per byte 1.2500"
    assert table["speed"] == "1,000 tokens/s (median)"
    assert table["report"] == "runs/demo/reports/heldout.json"
    for place in ("run", "checkpoints", "metrics", "report"):
        assert (tmp_path / table[place]).exists()
    left = [p for p in psutil.process_iter(["cmdline", "cwd"]) if p.info["cwd"] == str(tmp_path)]
    assert left == []


def test_the_exit_code_of_a_failing_step_is_passed_on(stubbed: Cli) -> None:
    run = stubbed("quickstart", "data=text", "data.source=nowhere")
    assert run.returncode == 4
    assert run.stderr.startswith("titans-dist: ")
    assert run.stderr.count("\n") == 1


def test_an_earlier_run_is_moved_aside_and_kept(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        run_dir = here / "runs" / "quickstart"
        run_dir.mkdir(parents=True, exist_ok=True)
        quickstart.set_aside(run_dir)
        assert list(run_dir.iterdir()) == []
        (run_dir / "metrics.jsonl").write_text(str(number))
    assert [(here / f"runs/quickstart.{n}/metrics.jsonl").read_text() for n in (1, 2)] == ["0", "1"]
    assert capsys.readouterr().out == "".join(
        f"moved the earlier runs/quickstart to runs/quickstart.{n}\n" for n in (1, 2)
    )


@pytest.mark.parametrize(
    ("rows", "due"),
    [
        ([train(step) for step in range(1, 90)], False),  # nothing saved yet
        ([*map(train, range(1, 40)), checkpoint(30)], False),  # not half way
        ([*map(train, range(1, 52)), checkpoint(50)], False),  # nothing to lose
        ([*map(train, range(1, 54)), checkpoint(50)], True),
        ([*map(train, range(1, 51)), checkpoint(40)], True),
    ],
)
def test_the_kill_comes_half_way_and_some_steps_past_a_checkpoint(rows: list[dict], due: bool) -> None:
    assert quickstart.due(rows, 100) is due


def test_training_that_ends_before_the_kill_is_a_failure(stubbed: Cli) -> None:
    run = stubbed("quickstart", "data=synthetic", "training.steps=12", "checkpoint.interval=12", "parallel=single")
    assert run.returncode == 1
    assert run.stderr.startswith("titans-dist: training ended before it could be killed between step 6 and 12")


def test_the_story_is_read_from_the_metrics() -> None:
    rows = [train(1, 8.0), train(2, 7.0), checkpoint(2), train(3, 6.5), train(4, 6.0)]
    after = [{"kind": "event", "name": "resume", "step": 2}, train(3, 6.6), train(4, 6.1), checkpoint(4)]
    story = quickstart.tell(rows + after, len(rows))
    assert (story.first, story.killed, story.checkpoint) == ((1, 8.0), (4, 6.0), 2)
    assert (story.resumed, story.last, story.tokens_per_s) == ((3, 6.6), (4, 6.1), 300.0)
    quickstart.check(story)


@pytest.mark.parametrize(
    ("after", "sentence"),
    [
        ([train(4, 5.0)], "began at step 4, but the newest checkpoint before the kill was at step 2"),
        ([train(1, 5.0)], "began at step 1, but"),
        ([train(3, 9.0)], "the loss went from 8.0000 to 9.0000"),
        ([train(3, float("nan"))], "the loss went from 8.0000 to nan"),
        ([], "the resumed run did nothing"),
    ],
)
def test_what_went_wrong_is_said(after: list[dict], sentence: str) -> None:
    rows = [train(1, 8.0), train(2, 7.0), checkpoint(2), train(3, 6.5)]
    with pytest.raises(UserError, match=sentence):
        quickstart.check(quickstart.tell(rows + after, len(rows)))
