"""`titans-dist plan`: tables, JSON, a picture, and an exit code that says whether it fits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.command_line import Cli, environment
from titans_dist.plan import truth
from titans_launch.cli import main

EXPERIMENTS = ("quickstart", "titans_170m", "titans_340m", "titans_760m", "titans_1b3")
VARIANTS = ("lmm", "mac", "mag", "mal", "transformer", "swa", "mamba2", "deltanet", "gated_deltanet")
SOURCE = "data.format=synthetic"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_run_on_a_cluster_is_planned_in_seconds_and_leaves_nothing(cli: Cli, tmp_path: Path) -> None:
    run = cli("plan", "experiment=titans_760m", "cluster=h100_4x8")
    assert run.returncode == 0, run.stderr
    for words in (
        "fits: ",
        "32 x H100 SXM 80 GB: tensor 1 x data 32",
        "memory of a GPU in GB",
        "forward and backward (basis of the MFU)",
        "data messages",
        "60,000 steps: ",
        "ranks 24 to 31: data 24 to 31",
        "assumptions",
    ):
        assert words in run.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_plans(experiment: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["plan", f"experiment={experiment}", "--json", *(["parallel.data=8"] * (experiment != "quickstart"))])
    told = json.loads(capsys.readouterr().out)
    assert code == (0 if told["fits"] else 1)
    assert told["memory"][0]["peak_bytes"] > 14 * told["model_parameters"] / 8
    assert 0 < told["time"]["step_s"]["fast"] < told["time"]["step_s"]["slow"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_plans_on_every_kind_of_layout(variant: str, capsys: pytest.CaptureFixture[str]) -> None:
    # Heads of 64: 16 of them.
    layout = ["parallel.tensor=2", "parallel.context=2", "parallel.pipeline=2", "parallel.data=4"]
    main(["plan", "experiment=titans_340m", f"variant={variant}", "--json", *layout])
    told = json.loads(capsys.readouterr().out)
    assert told["gpus"] == 32
    assert {one["kind"] for one in told["time"]["messages"]} == {"tensor", "context", "pipeline", "data"}
    assert (told["flops_per_token"]["forward"]["memory"] > 0) == (variant not in ("transformer", "swa"))


def test_what_does_not_fit_is_exit_code_1_with_a_mend_that_works(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["experiment=titans_1b3", "cluster=h100_4x8", "training.recompute=none"]
    assert main(["plan", *arguments, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["bound"].startswith("memory: ")
    assert main(["plan", *arguments]) == 1
    assert f"nearest that fits │ {' '.join(told['nearest'])}" in capsys.readouterr().out
    assert main(["plan", *arguments, *told["nearest"]]) == 0


def test_layouts_of_so_many_gpus_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "experiment=titans_170m", "--search", "4", "--gpu", "h200", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["layout"] == "tensor 1 x data 4"
    assert all(row["peak_bytes"] < 141e9 for row in rows)


def test_a_search_that_finds_nothing_says_how_much_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    own = "".join(
        f"{key}: {value}\n"
        for key, value in {
            "bfloat16": 1e14, "float32": 1e13, "memory_gb": 4.0, "memory_bandwidth": 1e12, "link": 1e10, "network": 1e9
        }.items()
    )  # fmt: skip
    Path("small.yaml").write_text(own)
    assert main(["plan", "experiment=titans_1b3", "--search", "2", "--gpu", "small.yaml"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("no layout of 2 x small fits: the least is ")
    assert out.rstrip().endswith(" GB a GPU; use more GPUs or shorter sequences")


def test_a_picture_is_drawn_only_when_asked_for() -> None:
    assert main(["plan", "experiment=titans_170m", "parallel.data=8", "--picture", "out/memory.png"]) == 0
    assert Path("out/memory.png").read_bytes().startswith(b"\x89PNG")


def test_a_plan_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from titans_launch.cli import main\n"
        "assert main(['plan', 'experiment=titans_170m', 'parallel.data=8']) == 0\n"
        "assert not {'torch', 'megatron', 'matplotlib'} & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


def test_the_real_model_of_the_first_and_last_stage_is_put_beside_the_plan(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ["experiment=titans_170m", "model.num_layers=2", "model.vocab_size=512", "data.vocab_size=512"]
    small += ["data.sequence_length=512", "parallel.tensor=2", "parallel.pipeline=2", "parallel.data=4", "--verify"]
    assert main(["plan", *small, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["verified"]
    assert {one["rank"] for one in told} == {0, 8}
    assert {"parameters", "states", "FLOPs", "tensor all_gather bytes", "pipeline send calls"} <= {
        one["what"] for one in told
    }
    assert all(one["holds"] and one["real"] == pytest.approx(one["planned"], rel=0.25) for one in told)
    monkeypatch.setitem(truth.LIMITS, "logits", 0.0)  # a formula that is off by more than it may be
    assert main(["plan", *small]) == 1
    out = capsys.readouterr().out
    assert "rank 8 of 16, stage 1: the plan beside the real model" in out
    assert out.rstrip().endswith("the plan is off: logits; trust the real model's numbers")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h300"], "plan.gpu=h300 is unknown; choose one of a100, h100, h200, b200, mi300x"),
        (["--search", "0"], "plan.search=0 is too small; use 1 or more"),
        (["--search"], "--search has no value; write --search VALUE or plan.search=VALUE"),
        (
            ["--search", "8", "--verify"],
            "--verify is for one layout, and --search lists several; choose one of the two",
        ),
        (["training.engine=deepspeed", "parallel.data=8", "--verify"], "use training.engine=megatron"),
        (["cluster=h100_4x8", "parallel.tensor=3"], "parallel.tensor=3 does not divide"),
        (["cluster=h100_4x8", "parallel.pipeline=12", "training.global_batch_size=128"], "32 processes do not fit"),
        (["parallel.data=7"], "training.global_batch_size=128 is no multiple of micro_batch_size x data-parallel size"),
    ],
)
def test_bad_input_is_told_in_a_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "experiment=titans_170m", *arguments]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.out == ""
    assert "Traceback" not in told.err
