"""`titans-dist resume --explain` says what the start then does; `resume` starts only where there is a checkpoint."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.config.test_composition import composed
from tests.launch import runs
from tests.launch.runs import OVERRIDES
from tests.launch.test_checkpoint_command import HOLD, flip
from tests.training.jobs import STEPS, Run, corpus, finish, job
from titans_data import PrepareOptions, prepare
from titans_dist.checkpoint.mirror import upload
from titans_dist.parallel.peers import own_versions
from titans_dist.run.data import open_training
from titans_launch.cli import main

Output = pytest.CaptureFixture[str]

STEP = 8
"""The checkpoint from which the runs of these tests go on."""
LATER = f"from step {STEP + 1} on"
RESHARDS = "reshards: every process reads its part"
ROUNDING = "allowed: the same but for rounding"
ANOTHER_RUN = "refused: it would be another run"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of which the newest checkpoint is that of step 8, and three datasets."""
    run = runs.trained(tmp_path_factory.mktemp("made"))
    shutil.rmtree(run.store.folder(STEPS))
    data = run.folder.parents[1] / "data"
    for name, tokenizer in (("other", "bytes"), ("words", "bpe")):
        corpus(data / name / "text")
        (data / name / "text" / "more.txt").write_text(name * 200)
        options = PrepareOptions("text", str(data / name / "text"), tokenizer=tokenizer, vocab_size=300)
        prepare(options, data / name / "set")
    return run


@pytest.fixture
def run(made: Run, here: Path) -> Run:
    """The run `mine` of the current folder."""
    return runs.copied(made, here, "mine")


def explained(capsys: Output, *overrides: str) -> tuple[int, str, list[list[str]]]:
    """Exit code, the sentence on stderr, and the rows of all tables."""
    capsys.readouterr()
    code = main(["resume", "--explain", *OVERRIDES, "name=mine", *overrides])
    printed = capsys.readouterr()
    return code, printed.err, runs.rows(printed.out)


def differences(rows: list[list[str]]) -> dict[str, list[str]]:
    """What differs -> as it was saved, as it is now, what that means; but for versions."""
    return {row[0]: row[1:] for row in rows if len(row) == 4 and row[0] and not row[0].startswith("version of ")}


def started(here: Path, *overrides: str, world: int = 1) -> tuple[int, str, list[int]]:
    """What the real start does: exit code, the sentence on stderr, the steps it trains."""
    run = Run(here / "runs" / "mine")
    before = len(run.steps)
    with job(here, "train", *OVERRIDES, "name=mine", *overrides, world=world) as real:
        codes = real.wait()
    assert len(set(codes)) == 1
    return codes[0], real.err, run.steps[before:]


# Every kind of difference: the verdict is what the start does

GOES_ON = {
    "nothing": ([], 1, {}),
    "layout": (
        ["parallel.tensor=2", "parallel.sequence=false"],
        2,
        {
            "processes": ["1", "2", RESHARDS],
            "parallel.tensor": ["1", "2", RESHARDS],
            "parallel.sequence": ["true", "false", ROUNDING],
        },
    ),
    "copies": (
        ["parallel.data=2"],
        2,
        {"processes": ["1", "2", RESHARDS], "parallel.data": ["1", "2", RESHARDS]},
    ),
    "engine": (
        ["training.engine=deepspeed", "training.zero_stage=1"],
        1,
        {
            "training.engine": ["megatron", "deepspeed", RESHARDS],
            "training.zero_stage": ["null", "1", RESHARDS],
        },
    ),
    "precision": (["training.precision=bfloat16"], 1, {"training.precision": ["float32", "bfloat16", LATER]}),
    "settings": (
        ["optimizer.lr=1e-4", "training.steps=10", "checkpoint.interval=1", "training.micro_batch_size=2"],
        1,
        {
            "optimizer.lr": ["0.003", "0.0001", LATER],
            "training.steps": ["12", "10", LATER],
            "checkpoint.interval": ["4", "1", "allowed: training does not depend on it"],
            "training.micro_batch_size": ["4", "2", ROUNDING],
        },
    ),
    "how the model is computed": (
        ["model.memory.backend=torch", "model.memory.momentum=true", "model.parameters=null"],
        1,
        {
            "model.memory.backend": ["auto", "torch", ROUNDING],
            "model.memory.momentum": ["null", "true", "allowed: it means the same"],
        },
    ),
    "the folder of the dataset": (
        ["data.path=data/moved"],
        1,
        {"data.path": ["data/bytes", "data/moved", "allowed: a dataset is known by its fingerprint"]},
    ),
}

REFUSED = {
    "model": (
        ["model.window=4", "model.num_heads=2"],
        4,
        {"model.window": ["8", "4", ANOTHER_RUN], "model.num_heads": ["4", "2", ANOTHER_RUN]},
    ),
    "order of the data": (["data.seed=7"], 4, {"data.seed": ["1234", "7", ANOTHER_RUN]}),
    "batch": (
        ["training.global_batch_size=16"],
        4,
        {"training.global_batch_size": ["8", "16", ANOTHER_RUN]},
    ),
    "dataset": (["data=mds", "data.path=data/other/set"], 4, {}),
    "tokenizer": (["data=mds", "data.path=data/words/set"], 4, {}),
    "lost dataset": (["data=mds", "data.path=data/lost"], 4, {}),
    "options of the dataset": (["data.validation_fraction=0.3"], 4, None),
    "layout": (["parallel.data=3"], 2, None),
}


@pytest.mark.parametrize("kind", GOES_ON)
def test_what_is_allowed_goes_on(kind: str, run: Run, here: Path, capsys: Output) -> None:
    overrides, world, expected = GOES_ON[kind]
    shutil.copytree("data/bytes", "data/moved")
    code, error, rows = explained(capsys, *overrides)
    assert (code, error) == (0, "")
    assert differences(rows) == expected
    versions = {row[0]: row[1:] for row in rows if row[0].startswith("version of ")}
    assert versions["version of torch"] == ["2.12.0", own_versions()["torch"], ROUNDING]
    code, error, steps = started(here, *overrides, world=world)
    assert (code, error) == (0, "")
    assert steps[0] == STEP + 1


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_is_refused_in_the_words_of_the_start(kind: str, run: Run, here: Path, capsys: Output) -> None:
    overrides, expected_code, expected = REFUSED[kind]
    code, error, rows = explained(capsys, *overrides)
    assert code == expected_code
    assert error.startswith("titans-dist: ") and error.count("\n") == 1
    if expected is not None:
        found = differences(rows)
        assert {key: found[key] for key in expected} == expected
        if not expected:
            assert found["data"][2] == "refused: " + error.removeprefix("titans-dist: ").strip()
    if kind != "options of the dataset":  # that is for the launcher, which prepares the data
        assert started(here, *overrides) == (code, error, [])
    else:
        assert main(["train", *OVERRIDES, "name=mine", *overrides]) == code
        assert capsys.readouterr().err == error


def test_an_edited_mixture_counts_from_the_next_step_on(made: Run, here: Path, capsys: Output) -> None:
    shutil.copytree(made.folder.parents[1] / "data", "data")
    mixture = ("data=mixture", "+data.sources.web=data/bytes", "+data.sources.code=data/other/set")
    even = "data.stages=[{weights:{web:1,code:1}}]"
    finish(here, "train", *OVERRIDES, "name=mine", *mixture, even, f"training.steps={STEP}")
    renamed = ("data=mixture", "+data.sources.crawl=data/bytes", "+data.sources.code=data/other/set")
    edited = "data.stages=[{weights:{crawl:3,code:1}},{from_tokens:2560,weights:{code:1}}]"
    code, _, rows = explained(capsys, *renamed, edited)
    assert code == 0
    found = differences(rows)
    assert found["mixture"] == [
        "web 50.00%, code 50.00%",
        "crawl 75.00%, code 25.00%; from step 11 code 100.00%",
        LATER,
    ]
    assert found["name of a dataset"] == ["web", "crawl", "allowed: a dataset is known by its fingerprint"]
    assert started(here, *renamed, edited)[2] == list(range(STEP + 1, STEPS + 1))


# The checkpoint


def test_damaged_checkpoints_are_passed_over_and_named(run: Run, here: Path, capsys: Output) -> None:
    flip(run.store.folder(STEP) / "__0_0.distcp")
    shutil.copytree(run.store.folder(STEP), run.store.root / "step_00000009.tmp")
    assert main(["resume", "--explain", *OVERRIDES, "name=mine"]) == 0
    printed = capsys.readouterr().out
    assert ["would be used", "runs/mine/checkpoints/step_00000004"] in runs.rows(printed)
    with job(here, "train", *OVERRIDES, "name=mine") as real:
        assert real.wait() == [0]
    passed_over = [line for line in real.out.splitlines() if line.endswith(("trying the one before it", "is ignored"))]
    assert len(passed_over) == 2
    assert printed.splitlines()[:2] == passed_over
    assert run.after_resume()[0] == 5


@pytest.mark.parametrize("flags", [[], ["--explain"]], ids=["resume", "explain"])
@pytest.mark.parametrize("damage", ["no folder", "all damaged"])
def test_without_a_checkpoint_nothing_is_resumed(
    flags: list[str], damage: str, run: Run, here: Path, capsys: Output
) -> None:
    why = ""
    if damage == "no folder":
        shutil.rmtree("runs")
    else:
        for step in run.store.committed():
            (run.store.folder(step) / "common.json").unlink()
        why = f" (checkpoint {run.store.folder(STEP)} is damaged: common.json is missing; trying the one before it)"
    before = sorted(here.rglob("*"))
    assert main(["resume", *flags, *OVERRIDES, "name=mine"]) == 4
    assert capsys.readouterr().err == (
        f"titans-dist: runs/mine has no checkpoint to go on from{why}; give the name=NAME and the overrides the run "
        "was started with, or start it with titans-dist train\n"
    )
    assert sorted(here.rglob("*")) == before


def test_a_run_that_is_being_trained_is_refused_after_all_else_is_said(run: Run, capsys: Output) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run.store.root)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        code, error, rows = explained(capsys, "optimizer.lr=1e-4", "model.window=4")
        holder.kill()
    assert code == 4
    assert error.startswith(f"titans-dist: process {holder.pid} on ")
    assert error.endswith(f"is training this run and writes {run.store.root}: stop it, or give this run another name\n")
    assert {"optimizer.lr", "model.window"} <= differences(rows).keys()


def test_a_checkpoint_in_the_mirror_is_what_a_start_would_fetch(run: Run, here: Path, capsys: Output) -> None:
    upload(run.store, STEP, str(here / "mirror"))
    shutil.rmtree("runs")
    mirror = f"checkpoint.mirror={here / 'mirror'}"
    code, _, rows = explained(capsys, mirror)
    assert code == 0
    assert ["would be used", f"runs/mine/checkpoints/step_{STEP:08}, fetched from {here / 'mirror'}"] in rows
    assert not Path("runs").exists()
    assert main(["resume", "--explain", *OVERRIDES, "name=mine", f"checkpoint.mirror={here / 'nothing'}"]) == 4


def test_a_checkpoint_of_which_nothing_is_known_but_what_it_is(run: Run, capsys: Output) -> None:
    """As of an import."""
    meta = run.store.meta(STEP)
    runs.tell(run.store, STEP, **{key: None for key in meta if key != "identity"})
    code, _, rows = explained(capsys)
    assert (code, differences(rows)) == (0, {})


# The samples


def test_the_next_samples_are_those_of_the_order(run: Run, capsys: Output) -> None:
    _, _, rows = explained(capsys, "parallel.data=4", "training.micro_batch_size=2")
    samples = [row for row in rows if len(row) == 7 and row[0].isdigit()]
    data = open_training(composed(*OVERRIDES), run.store.meta(STEP)["data"])
    order = data.schedule.rows(STEP).tolist()
    assert [(int(row[1]), int(row[2]), int(row[5])) for row in samples] == [
        (slot, slot // 2, place) for slot, place in enumerate(order)
    ]
    assert {row[0] for row in samples} == {str(STEP + 1)}
    # What was left out by going back stays out.
    runs.tell(run.store, STEP, health={"detours": [[STEP, 2]]})
    _, _, rows = explained(capsys)
    order = data.schedule.rows(STEP + 2).tolist()
    assert [int(row[5]) for row in rows if len(row) == 7 and row[0].isdigit()] == order


def test_the_plan_of_the_data_knows_what_going_back_has_left_out(run: Run, capsys: Output, tmp_path: Path) -> None:
    runs.tell(run.store, STEP, health={"detours": [[STEP - 1, 2]]})
    listed = tmp_path / "samples.csv"
    steps = ("inspect.step=1", f"inspect.to_step={STEP + 1}", f"inspect.output={listed}")
    assert main(["data", "plan", *OVERRIDES, "name=mine", *steps]) == 0
    assert "the data of 2 steps was left out by going back" in capsys.readouterr().out
    schedule = open_training(composed(*OVERRIDES), run.store.meta(STEP)["data"]).schedule
    read = [step - 1 if step < STEP else step + 1 for step in range(1, STEP + 2)]
    rows = [line.split(",") for line in listed.read_text().splitlines()[1:]]
    assert [int(row[5]) for row in rows] == [row for step in read for row in schedule.rows(step).tolist()]


def test_a_run_that_is_done_says_so(run: Run, capsys: Output) -> None:
    assert main(["resume", "--explain", *OVERRIDES, "name=mine", f"training.steps={STEP}"]) == 0
    assert f"the run is done: {STEP} of {STEP} steps; nothing would be trained" in capsys.readouterr().out


def test_a_dataset_that_is_not_prepared_is_not_judged(run: Run, capsys: Output) -> None:
    shutil.rmtree("data")
    code, error, _ = explained(capsys)
    assert code == 4
    assert "a start would prepare data/bytes first" in error
    assert not Path("data").exists()


def test_explain_changes_nothing(run: Run, here: Path, capsys: Output) -> None:
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    assert explained(capsys)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before


def test_resume_trains_on(run: Run, here: Path) -> None:
    with job(here, "resume", *OVERRIDES, "name=mine") as real:
        assert real.wait() == [0]
    assert run.after_resume() == list(range(STEP + 1, STEPS + 1))
