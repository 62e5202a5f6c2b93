"""A follower measures each checkpoint once, by its schedule and within its budget, whatever happens meanwhile."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.launch.command_line import command, environment
from tests.tracking.test_wandb import read_offline
from tests.training.jobs import SINGLE, SIZES, TEXT, Run, corpus, job
from titans_data import PrepareOptions, prepare
from titans_dist.checkpoint.store import Store
from titans_dist.config import Config, EvaluationConfig, UserError
from titans_dist.config.evaluation import FollowConfig
from titans_dist.evaluation import follow
from titans_dist.evaluation.driver import open_ledger
from titans_dist.evaluation.follow import Checkpoint, Follower, due
from titans_dist.evaluation.ledger import Ledger, Measured, Row
from titans_dist.evaluation.work import Result, pieces
from titans_dist.run.folder import write_status
from titans_dist.tracking.evaluations import Evaluations
from titans_launch import cli

INTERVAL, STEPS = 10, 60


class World:
    """A run that trains by itself while the follower sleeps or measures, in a time of its own.

    Every `step_s` seconds a checkpoint is committed and the oldest but `keep` removed; to measure one takes `cost_s`.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = Store(folder / "checkpoints")
        self.folder, self.now, self.saved = folder, 0.0, 0
        self.step_s, self.cost_s, self.keep, self.steps = 100.0, 1.0, 100, STEPS
        self.measured: list[tuple[int, tuple[str, ...]]] = []
        self.said: list[str] = []
        self.fate: dict[int, Callable[[], None]] = {}
        """Step -> what happens when it is measured."""
        self.status = "done"
        """What the run says after its last step."""
        write_status(self.config(), "running")
        monkeypatch.setattr(follow, "measure", self.measure)
        monkeypatch.setattr(follow, "check_tasks", lambda config: None)
        monkeypatch.setattr(follow, "time", self)

    def config(self, **changes: Any) -> Config:
        settings = {"budget": 1.0, "poll_s": 10.0, **changes}
        evaluation = EvaluationConfig(
            tasks=["cheap", "long"], lengths=[64], samples=4, shard=2, follow=FollowConfig(**settings)
        )
        config = Config(name="x", run_dir=str(self.folder), evaluation=evaluation)
        config.checkpoint.interval, config.training.steps = INTERVAL, self.steps
        return config

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        while self.saved < self.steps and self.saved / INTERVAL < self.now // self.step_s:
            self.commit(self.saved + INTERVAL)

    def commit(self, step: int) -> None:
        self.saved = step
        (self.store.begin(step) / "weights").write_bytes(bytes([step]))
        saved = {"checkpoint": {"interval": INTERVAL}, "training": {"steps": self.steps}}
        self.store.commit(step, {"tokens": 100 * step, "config": saved})
        self.store.prune(self.keep)
        if step == self.steps:
            write_status(self.config(), self.status)

    def measure(self, config: Config, say: Callable[[str], None]) -> None:
        step = config.evaluation.step
        assert step is not None
        if fate := self.fate.pop(step, None):
            fate()
        measured = Measured(self.store.digest(step), step, 100 * step, "mag titans")
        ledger = open_ledger(config)
        missing = [piece for piece in pieces(config.evaluation) if piece.key not in ledger.done(measured.checkpoint)]
        assert missing, "nothing is measured twice"
        self.measured.append((step, tuple(config.evaluation.tasks)))
        for piece in missing:
            ledger.add(measured, piece, Result([step / 100] * piece.count, "digest", 64, 0.1, 1, {}))
        self.sleep(self.cost_s)

    def follow(self, **changes: Any) -> None:
        config = self.config(**changes)
        Follower(config, config, self.said.append).follow()

    @property
    def steps_measured(self) -> list[int]:
        return [step for step, _ in self.measured]

    @property
    def published(self) -> list[dict[str, Any]]:
        return Evaluations(self.folder).new()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def test_each_task_has_its_turn_and_the_last_checkpoint_has_all() -> None:
    def at(ordinal: int, is_last: bool = False) -> list[str]:
        return due(["a", "b", "c"], {"b": 2, "c": 3}, Checkpoint(0, "", ordinal, is_last, None))

    assert [at(ordinal) for ordinal in range(1, 7)] == [["a"], ["a", "b"], ["a", "c"], ["a", "b"], ["a"], list("abc")]
    assert at(5, is_last=True) == ["a", "b", "c"]


def test_the_schedule_counts_checkpoints_by_their_steps(world: World) -> None:
    world.follow(every={"long": 2})
    both = ("cheap", "long")
    assert world.measured == [(10, ("cheap",)), (20, both), (30, ("cheap",)), (40, both), (50, ("cheap",)), (60, both)]
    assert world.said[-1] == "the run is done, and all there is to measure of it is measured"


def test_a_follower_that_comes_later_goes_by_the_same_schedule_newest_first(world: World) -> None:
    world.sleep(250)
    world.follow(every={"long": 2})
    assert world.measured[:2] == [(20, ("cheap", "long")), (10, ("cheap",))]


def test_results_stand_at_the_tokens_of_their_checkpoint(world: World) -> None:
    world.steps = 20
    world.follow(every={"long": 2})
    rows = [
        {k: row[k] for k in ("kind", "step", "tokens", "task", "length", "mean", "samples")} for row in world.published
    ]
    assert rows == [
        {
            "kind": "evaluation",
            "step": step,
            "tokens": 100 * step,
            "task": task,
            "length": 64,
            "mean": mean,
            "samples": 4,
        }
        for step, task, mean in ((10, "cheap", 0.1), (20, "cheap", 0.2), (20, "long", 0.2))
    ]
    assert {row["checkpoint"] for row in world.published} == {world.store.digest(step) for step in (10, 20)}


def test_what_a_killed_follower_has_measured_but_not_published_is_published_once(world: World) -> None:
    world.steps = 20
    world.follow()
    rows = world.published
    path = world.folder / "evaluation.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n").rpartition(b"\n")[0] + b'\n{"kind": "eval')
    world.follow()
    world.follow()
    assert world.steps_measured == [10, 20]
    assert [row | {"time": 0} for row in world.published] == [row | {"time": 0} for row in rows]


def test_a_mean_is_not_published_before_all_of_its_samples_are_measured(world: World) -> None:
    world.steps = 10
    world.sleep(100)
    config = world.config()
    piece, *_ = pieces(config.evaluation)
    measured = Measured(world.store.digest(10), 10, 1000, "mag titans")
    open_ledger(config).add(measured, piece, Result([0.0, 0.0], "digest", 64, 0.1, 1, {}))
    world.fate[10] = lambda: written.append(len(world.published))
    written: list[int] = []
    world.follow()
    assert written == [0]
    assert [(row["task"], row["samples"], row["mean"]) for row in world.published] == [
        ("cheap", 4, pytest.approx(0.05)),
        ("long", 4, pytest.approx(0.1)),
    ]


def test_the_budget_holds_while_the_run_is_trained_and_the_newest_checkpoint_comes_first(world: World) -> None:
    world.cost_s, world.steps = 250.0, 100
    shares = []

    def keep_share(step: int) -> Callable[[], None]:
        return lambda: shares.append(250.0 * len(world.measured) / world.now)

    world.fate = {step: keep_share(step) for step in range(10, 91, 10)}
    world.follow(budget=0.5)
    # At 100 s, at 500 s and, when the run is done at 1,000 s, all that are left.
    assert world.steps_measured[:3] == [10, 50, 100]
    assert max(shares[:2]) <= 0.5
    assert sorted(world.steps_measured) == list(range(10, 101, 10)), "nothing is forgotten, and nothing done twice"
    assert (
        "step 30 waits: 250 s of 350 s went into measuring, and evaluation.follow.budget=0.5 allows 175 s" in world.said
    )


def test_what_retention_takes_away_while_it_waits_is_passed_over_in_one_sentence(world: World) -> None:
    world.cost_s, world.keep = 250.0, 2
    world.follow(budget=0.4)
    assert world.steps_measured[0] == 10 and world.steps_measured[-2:] == [60, 50]
    assert world.said.count("step 30 was removed before its turn; it is passed over") == 1
    assert len(world.steps_measured) < 6


def test_a_checkpoint_that_goes_while_it_is_read_is_passed_over(world: World) -> None:
    def gone() -> None:
        world.store._remove(20)
        raise UserError("a worker cannot begin: FileNotFoundError")

    world.fate[20] = gone
    world.follow()
    assert world.steps_measured == [10, 30, 40, 50, 60]
    assert "step 20 was removed while it was read; it is passed over" in world.said


@pytest.mark.parametrize("file", ["weights", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over(world: World, file: str) -> None:
    def damage(step: int) -> None:
        (world.store.folder(step) / file).write_text("x")

    world.steps = 30
    world.sleep(200)
    damage(20)
    if file == "weights":
        world.fate[20] = lambda: world.store.verify(20)
    world.follow()
    assert world.steps_measured == [10, 30]
    (sentence,) = [line for line in world.said if "damaged" in line]
    assert str(world.store.folder(20)) in sentence and sentence.endswith("; it is passed over")


def failing() -> None:
    raise UserError("long at 64 tokens, samples 0 to 1 has lost 4 workers")


def test_a_checkpoint_that_cannot_be_measured_whole_does_not_end_the_following_but_is_not_forgotten(
    world: World,
) -> None:
    world.fate[20] = failing
    with pytest.raises(UserError, match=r"step 20 could not be measured whole: long at 64 .* the same command tries"):
        world.follow()
    assert world.steps_measured == [10, 30, 40, 50, 60]
    world.follow()
    assert world.steps_measured[5:] == [20]


def test_if_the_first_cannot_be_measured_nothing_is_waited_for(world: World) -> None:
    world.fate[10] = failing
    with pytest.raises(UserError, match=r"^long at 64 tokens"):
        world.follow()
    assert world.now < 200


def test_ctrl_c_ends_it_at_once_and_keeps_what_is_finished(world: World) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    world.fate[30] = interrupt
    with pytest.raises(KeyboardInterrupt):
        world.follow()
    assert world.steps_measured == [10, 20] == sorted({row["step"] for row in world.published})
    world.follow()
    assert world.steps_measured == [10, 20, 30, 40, 50, 60]


def test_a_run_that_went_back_is_measured_again_where_it_came_by_again(world: World) -> None:
    world.steps = 40
    world.sleep(300)
    world.follow(patience_s=1.0, poll_s=1.0)
    world.store.discard_after(10)
    (world.store.begin(20) / "weights").write_bytes(b"another")
    world.store.commit(20, {"tokens": 2000, "config": {"checkpoint": {"interval": 10}, "training": {"steps": 40}}})
    world.follow(patience_s=1.0, poll_s=1.0)
    assert world.steps_measured == [30, 20, 10, 20]


def test_it_ends_when_nothing_new_comes(world: World) -> None:
    world.steps, world.status = 20, "running"  # killed after its last checkpoint
    world.follow(patience_s=500.0)
    assert world.steps_measured == [10, 20]
    assert 690 <= world.now <= 720
    assert world.said[-1] == "no new checkpoint for 500 s; start it again when there is one"


# A run that is really trained, in processes of their own


SAMPLES = 8
SUITE = ("evaluation.tasks=[positions,mqar]", "evaluation.lengths=[320]", f"evaluation.samples={SAMPLES}")
FOLLOW = ("evaluate", "--follow", "run", *SUITE, "evaluation.workers=1", "evaluation.follow.poll_s=0.2")
TIMEOUT_S = 180.0
PAUSES = {6: "first", 10: "second"}
"""Steps before which the training waits for a file in its folder: it is on its way as long as the test needs it."""


def paced(home: Path) -> Callable[[int], None]:
    """For tests.training.jobs.job."""

    def before(rank: int) -> None:
        from titans_dist.training.loop import Training

        step = Training._step

        def paused(training: Training, steps: Any, done: int) -> int:
            while (name := PAUSES.get(done + 1)) and not (home / name).exists():
                time.sleep(0.01)
            return step(training, steps, done)

        mock.patch.object(Training, "_step", paused).start()
        os.environ["WANDB_MODE"] = "offline"

    return before


class Process:
    """`titans-dist ARGUMENTS` in the background, in a process group of its own; its output is in a file."""

    def __init__(self, home: Path, name: str, *arguments: str) -> None:
        self.log = home / f"{name}.log"
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(
                command(*arguments),
                cwd=home,
                env=environment(WANDB_MODE="offline", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert self.popen.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def wait(self) -> tuple[int, str]:
        return self.popen.wait(timeout=TIMEOUT_S), self.log.read_text()

    def end(self, signum: int = signal.SIGKILL) -> None:
        if self.popen.poll() is None:
            self.popen.send_signal(signum)
            self.popen.wait(timeout=60)


@dataclasses.dataclass(frozen=True)
class Followed:
    """A run that was followed while it was trained by two followers, the first of which was killed."""

    home: Path
    run: Run
    steps: int
    """Steps that were trained when the second checkpoint was measured."""
    kept: list[Row]
    """What it had measured until then."""
    out: str
    """What the second has said."""

    @property
    def rows(self) -> list[Row]:
        return Ledger(self.run.folder / "reports" / "evaluation.sqlite").rows()


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Followed:
    home = tmp_path_factory.mktemp("home")
    corpus(home / "text")
    text = PrepareOptions(format="text", source=str(home / "text"), tokenizer="bytes", validation_fraction=0.2)
    prepare(text, home / "data" / "bytes")
    run = Run(home / "runs" / "run")
    path = run.folder / "reports" / "evaluation.sqlite"
    train = ("train", *TEXT, *SIZES, *SINGLE, "checkpoint.keep=9", "tracking=wandb", "name=run")
    follow = (*FOLLOW, "evaluation.follow.budget=1", "+evaluation.follow.every.mqar=2", "evaluation.shard=1")
    with job(home, *train, before=paced(home)) as training, ExitStack() as running:
        training.wait_until(lambda: run.store.committed() == [4])
        first = Process(home, "first", *follow)
        running.callback(first.end)
        first.wait_until(lambda: path.exists() and Ledger(path).rows())
        first.end()
        kept = Ledger(path).rows()
        (home / "first").touch()
        second = Process(home, "second", *follow)
        running.callback(second.end)
        second.wait_until(lambda: [row["step"] for row in published(run)].count(8) == 2)
        steps = max(run.steps)
        (home / "second").touch()
        assert training.wait() == [0], training.err
        code, out = second.wait()
        assert code == 0, out
    return Followed(home, run, steps, kept, out)


def published(run: Run) -> list[dict[str, Any]]:
    return Evaluations(run.folder).new()


def test_every_checkpoint_of_a_live_run_is_measured_once_at_its_tokens(followed: Followed) -> None:
    assert followed.run.store.committed() == [4, 8, 12]
    tokens = {row["step"]: row["tokens"] for row in followed.run.rows if row["kind"] == "train"}
    found = [(row["step"], row["tokens"], row["task"], row["samples"]) for row in published(followed.run)]
    wanted = [(4, "positions"), (8, "mqar"), (8, "positions"), (12, "mqar"), (12, "positions")]
    assert sorted(found) == [(step, tokens[step], task, SAMPLES) for step, task in wanted]
    assert followed.run.status == "done"
    assert "the run is done, and all there is to measure of it is measured" in followed.out


def test_it_followed_while_the_run_was_trained_and_repeated_nothing_after_a_kill(followed: Followed) -> None:
    assert followed.steps < 12
    assert followed.kept and followed.rows[: len(followed.kept)] == followed.kept
    assert len(followed.rows) == SAMPLES * 5, "one row for each sample of each mean"
    left = SAMPLES - len(followed.kept)  # unless it was killed too late
    assert not left or f"step 4: {left} of {SAMPLES} pieces are to be measured" in followed.out


def test_the_results_are_those_of_measuring_the_checkpoint_by_itself(followed: Followed) -> None:
    (row,) = [row for row in published(followed.run) if (row["step"], row["task"]) == (12, "positions")]
    scores = [
        score
        for each in followed.rows
        if (each.measured.step, each.piece.task) == (12, "positions")
        for score in each.result.scores
    ]
    assert row["measures"] == "loss" and row["mean"] == pytest.approx(sum(scores) / SAMPLES)
    assert math.isfinite(row["mean"]) and row["mean"] < math.log(320)


def test_the_curves_are_in_the_wandb_run_of_the_training(followed: Followed) -> None:
    run_id = followed.run.store.meta(12)["wandb_id"]

    def curves(folder: Path) -> list[tuple[int, str, float]]:
        return [
            (int(row["tokens"]), key.removeprefix("evaluation/"), json.loads(value))
            for row in read_offline(folder, run_id)[0]
            for key, value in row.items()
            if key.startswith("evaluation/")
        ]

    # As long as it goes on, training passes the results on itself; what comes after its end, the follower does.
    by_training, by_follower = curves(followed.run.folder), curves(followed.run.folder / "reports")
    assert followed.run.store.meta(8)["tokens"] in {tokens for tokens, *_ in by_training}
    assert followed.run.store.meta(12)["tokens"] in {tokens for tokens, *_ in by_follower}
    wanted = [
        (row["tokens"], f"{row['task']}/{row['length']}", pytest.approx(row["mean"])) for row in published(followed.run)
    ]
    assert sorted(by_training + by_follower) == sorted(wanted, key=lambda each: each[:2])


def test_bad_input_is_one_sentence(
    followed: Followed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(followed.home)

    def refused(*arguments: str) -> tuple[int, str]:
        code, said = cli.main(list(arguments)), capsys.readouterr()
        (line,) = said.err.splitlines()
        assert said.out == "" and line.startswith("titans-dist: ")
        return code, line

    code, line = refused("evaluate", "--follow", "none", *SUITE)
    assert code == 2 and "runs/none has no config.yaml" in line
    assert not Path("runs", "none").exists()

    Path("runs", "bare", "checkpoints").mkdir(parents=True)
    code, line = refused("evaluate", "--follow", "bare", *SUITE)
    assert code == 2 and "runs/bare has no config.yaml" in line
    Path("runs", "bare", "config.yaml").write_text("nothing: {like: it}\n")
    code, line = refused("evaluate", "--follow", "bare", *SUITE)
    assert code == 2 and "runs/bare/config.yaml is not the configuration of a run" in line

    code, line = refused(*FOLLOW, "model.hidden_size=64")
    assert code == 4 and "holds another run: model.hidden_size=64 (it was 32)" in line
    code, line = refused("evaluate", "--follow", "run")
    assert code == 2 and "add a suite, such as suite=offline" in line
    code, line = refused(*FOLLOW, "+evaluation.follow.every.mqra=2")
    assert code == 2 and "evaluation.follow.every=mqra is unknown; choose one of positions, mqar" in line
    code, line = refused("evaluate", "--follow")
    assert code == 2 and "--follow has no value" in line
