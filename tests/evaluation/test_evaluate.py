"""`titans-dist evaluate` with a suite, from the command line to the ledger, on a real Ray."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.evaluation.test_heldout import is_held_out, weights
from tests.launch import command_line
from tests.training.jobs import SINGLE, SIZES, TENSOR_2, TEXT, Run, corpus, finish
from titans_data import PrepareOptions, prepare
from titans_data.tokenize import BytesTokenizer
from titans_dist.evaluation.ledger import Ledger, Row
from titans_dist.evaluation.tasks import load_text, tasks

TASKS = ("positions", "passkey", "babi_like_qa1")
LENGTHS = (1024, 1536)
SUITE = (
    *("evaluate", *TEXT, *SIZES, *SINGLE, "suite=offline", f"evaluation.tasks=[{','.join(TASKS)}]"),
    *("evaluation.text=text", "evaluation.samples=3", "evaluation.shard=2"),
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained run of four steps."""
    home = tmp_path_factory.mktemp("home")
    corpus(home / "text")
    options = PrepareOptions(format="text", source=str(home / "text"), tokenizer="bytes", validation_fraction=0.2)
    prepare(options, home / "data" / "bytes")
    steps = ("training.steps=4", "checkpoint.interval=2", "name=run")
    finish(home, "train", *TEXT, *SIZES, *TENSOR_2, *steps, world=2)
    return home


def suite(
    home: Path, name: str, *overrides: str, lengths: tuple[int, ...] = LENGTHS
) -> subprocess.CompletedProcess[str]:
    wanted = f"evaluation.lengths=[{','.join(map(str, lengths))}]"
    return command_line.run(*SUITE, wanted, f"name={name}", *overrides, cwd=home)


def rows(home: Path, name: str = "run") -> list[Row]:
    return Ledger(home / "runs" / name / "reports" / "evaluation.sqlite").rows()


def scores(found: list[Row], what: str) -> dict[tuple[str, int, int], Any]:
    return {
        (row.piece.task, row.piece.length, row.piece.first + number): value
        for row in found
        for number, value in enumerate(row.result.scores if what == "scores" else row.result.detail.get(what, []))
    }


@pytest.fixture(scope="module")
def measured(home: Path) -> list[Row]:
    """What two workers have measured."""
    done = suite(home, "run", "evaluation.workers=2")
    assert done.returncode == 0, done.stderr
    assert "step 4: 12 of 12 pieces are to be measured" in done.stdout
    assert "12 of 12 pieces" in done.stdout and "run at step 4" in done.stdout
    return rows(home)


@torch.no_grad()
def test_scores_are_those_of_the_plain_model(home: Path, measured: list[Row]) -> None:
    model, tokenizer = weights(Run(home / "runs" / "run"), 4), BytesTokenizer()
    text, known = load_text(home / "text"), tasks()
    for name in ("passkey", "babi_like_qa1"):
        for length in LENGTHS:
            for index in range(3):
                sample = known[name].sample(length, index, 42, tokenizer, text)
                prompt = list(sample.prompt.encode())
                answer: list[int] = []
                while len(answer) < sample.new_tokens and 256 not in answer:
                    logits = model(torch.tensor([prompt + answer]))[0, -1, :257]
                    answer.append(int(logits.argmax()))
                output = tokenizer.decode([token for token in answer if token != 256])
                assert scores(measured, "output")[name, length, index] == output
                assert scores(measured, "scores")[name, length, index] == known[name].score(sample, output)
                assert scores(measured, "prompt_tokens")[name, length, index] == len(prompt) <= length


@torch.no_grad()
def test_losses_are_those_of_the_plain_model(home: Path, measured: list[Row]) -> None:
    model = weights(Run(home / "runs" / "run"), 4)
    documents = [file.read_bytes() for file in sorted((home / "text").iterdir())]
    stream = torch.tensor([token for text in documents if is_held_out(text) for token in (*text, 256)])
    losses = scores(measured, "scores")
    for length in LENGTHS:
        for index in range(min(3, (len(stream) - 1) // length)):
            part = stream[index * length :][: length + 1]
            wanted = F.cross_entropy(model(part[None, :-1])[0].double(), part[1:]).item()
            assert losses.pop(("positions", length, index)) == pytest.approx(wanted, abs=1e-5)
    assert not [key for key in losses if key[0] == "positions"]


def test_what_is_measured_is_not_measured_again(home: Path, measured: list[Row]) -> None:
    again = suite(home, "run")
    assert again.returncode == 0, again.stderr
    assert "step 4: 0 of 12 pieces are to be measured" in again.stdout
    assert rows(home) == measured
    assert again.stdout.endswith("report: runs/run/reports/evaluation.html\n")
    assert "Evaluation of run" in (home / "runs" / "run" / "reports" / "evaluation.html").read_text()
    for task in TASKS:
        assert task in again.stdout


def test_one_copy_of_two_processes_measures_the_same(home: Path, measured: list[Row]) -> None:
    copied(home, "split")
    done = suite(home, "split", "evaluation.workers=1", "evaluation.tensor=2")
    assert done.returncode == 0, done.stderr
    found = rows(home, "split")
    assert {row.piece for row in found} == {row.piece for row in measured}
    assert {row.result.samples for row in found} == {row.result.samples for row in measured}
    assert scores(found, "output") == scores(measured, "output")
    wanted = scores(measured, "scores")
    assert scores(found, "scores") == {key: pytest.approx(value, abs=1e-5) for key, value in wanted.items()}


@torch.no_grad()
def test_a_task_of_the_harness_goes_the_same_way(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(home / "cache"))
    pages = ["A page of a book.\n", "Another one, which is longer. " * 20]
    (home / "pages.jsonl").write_text("".join(json.dumps({"page": page}) + "\n" for page in pages))
    (home / "tasks").mkdir()
    (home / "tasks" / "pages.yaml").write_text(
        f"""\
task: pages
dataset_path: json
dataset_kwargs: {{data_files: {{test: {home}/pages.jsonl}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{page}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
    )
    copied(home, "harness")
    wanted = ("evaluation.tasks=[lm/pages]", f"evaluation.task_folder={home}/tasks", "evaluation.workers=1")
    done = suite(home, "harness", *wanted, lengths=())
    assert done.returncode == 0, done.stderr
    (row,) = rows(home, "harness")
    model, losses = weights(Run(home / "runs" / "harness"), 4), []
    for page in pages:
        tokens = torch.tensor([256, *page.encode()])
        losses.append(F.cross_entropy(model(tokens[None, :-1])[0].double(), tokens[1:], reduction="sum").item())
    sizes = [len(page) for page in pages]
    assert row.result.scores == pytest.approx([x / n for x, n in zip(losses, sizes, strict=True)], abs=1e-5)
    bits = row.result.detail["metrics"]["bits_per_byte"]["value"]
    assert bits == pytest.approx(sum(losses) / sum(sizes) / math.log(2), abs=1e-5)
    line = next(line for line in done.stdout.splitlines() if "bits_per_byte" in line)
    assert "lm/pages" in line and "2 of 2" in line and f"{bits:.4f}" in line
    again = suite(home, "harness", *wanted, lengths=())
    assert "step 4: 0 of 1 pieces are to be measured" in again.stdout


def test_a_killed_evaluation_goes_on_where_it_was(home: Path, measured: list[Row]) -> None:
    copied(home, "killed")
    wanted = ("evaluation.lengths=[1024,1536]", "name=killed", "evaluation.workers=1")
    with subprocess.Popen(
        command_line.command(*SUITE, *wanted), cwd=home, env=command_line.environment(), stdout=subprocess.DEVNULL
    ) as started:
        path, deadline = home / "runs" / "killed" / "reports" / "evaluation.sqlite", time.monotonic() + 90
        while _count(path) < 3:
            assert started.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        started.kill()
    before = rows(home, "killed")
    assert 3 <= len(before) < 12
    done = suite(home, "killed")
    assert done.returncode == 0, done.stderr
    assert f"{12 - len(before)} of 12 pieces are to be measured" in done.stdout
    found = rows(home, "killed")
    assert [row for row in found if row in before] == before and len(found) == 12
    assert scores(found, "output") == scores(measured, "output")


@pytest.mark.parametrize(
    ("code", "overrides", "lengths", "sentence"),
    [
        (2, ("evaluation.tasks=[passkeys]",), LENGTHS, "evaluation.tasks has passkeys, which is unknown; did you mean"),
        (2, (), (64, 512), "passkey does not fit into 64 tokens of this tokenizer: this question and its answer need"),
        (4, ("evaluation.step=3",), LENGTHS, "step_00000003"),
        (4, ("model.memory.chunk_size=8",), LENGTHS, "model.memory.chunk_size=8 (it was 16)"),
        (1, ("evaluation.address=127.0.0.1:1", "evaluation.seed=1"), LENGTHS, "Ray at 127.0.0.1:1 cannot be reached"),
        (4, ("evaluation.text=nowhere",), LENGTHS, "nowhere"),
        (2, ("evaluation.tasks=[babilong_qa1]",), LENGTHS, "evaluation.babi"),
        (2, ("evaluation.tasks=[positions]", "evaluation.seed=1"), (1 << 20,), "too few for positions at 1,048,576"),
    ],
)
def test_bad_input_is_one_sentence(
    code: int, overrides: tuple[str, ...], lengths: tuple[int, ...], sentence: str, home: Path, measured: list[Row]
) -> None:
    refused = suite(home, "run", *overrides, lengths=lengths)
    assert refused.returncode == code, refused.stderr
    *_, line = refused.stderr.splitlines()
    assert line.startswith("titans-dist: ") and sentence in line
    assert "Traceback" not in refused.stderr
    assert rows(home) == measured, "nothing is written, least of all a zero"


def copied(home: Path, name: str) -> None:
    """The run once more, without its ledger."""
    shutil.copytree(home / "runs" / "run", home / "runs" / name, ignore=shutil.ignore_patterns("reports"))


def _count(path: Path) -> int:
    try:
        with sqlite3.connect(path) as connection:
            return int(connection.execute("SELECT count(*) FROM results").fetchone()[0])
    except sqlite3.OperationalError:
        return 0
