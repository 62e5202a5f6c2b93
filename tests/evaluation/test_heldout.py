"""`titans-dist evaluate` against a computation of its own: whole model, plain slices of the text, one row at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint

from tests.launch import command_line
from tests.training.jobs import (
    CONTEXT_2,
    DATA_2,
    PIPELINE_2,
    SINGLE,
    SIZES,
    TENSOR_2,
    TEXT,
    Run,
    corpus,
    finish,
    job,
    refusal,
)
from titans_data import PrepareOptions, prepare
from titans_dist.config import MemoryConfig, ModelConfig
from titans_dist.model import build_model

LENGTH, STEPS = 32, 4
MODEL = ModelConfig(
    vocab_size=320,
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    window=8,
    persistent_tokens=2,
    memory=MemoryConfig(chunk_size=16, expansion=1),
)
"""What `SIZES` says."""
EVALUATE = ("evaluate", *TEXT, *SIZES, "evaluation.micro_batch_size=8")
LAYOUTS = {
    "single": (SINGLE, 1),
    "tensor2": (TENSOR_2, 2),
    "data2": (DATA_2, 2),
    "pipeline2": (PIPELINE_2, 2),
    "context2": (CONTEXT_2, 2),
}


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run of four steps, and its held-out text as anybody can work it out from the corpus."""

    home: Path
    run: Run
    documents: list[bytes]
    stream: np.ndarray
    row_losses: np.ndarray
    """Mean loss of every row, in nats per token, of the checkpoint at step 4."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    home = tmp_path_factory.mktemp("home")
    texts = corpus(home / "text")
    prepare(
        PrepareOptions(format="text", source=str(home / "text"), tokenizer="bytes", validation_fraction=0.2),
        home / "data" / "bytes",
    )
    overrides = (f"training.steps={STEPS}", "checkpoint.interval=2", "name=run")
    finish(home, "train", *TEXT, *SIZES, *TENSOR_2, *overrides, world=2)
    run = Run(home / "runs" / "run")
    documents = [texts[name].encode() for name in sorted(texts) if is_held_out(texts[name].encode())]
    stream = np.array([token for document in documents for token in (*document, 256)])
    rows = (len(stream) - 1) // LENGTH
    model = weights(run, STEPS)
    losses = np.array([row_loss(model, stream, row) for row in range(rows)])
    return Trained(home, run, documents, stream, losses)


def is_held_out(document: bytes) -> bool:
    return int(hashlib.sha256(document).hexdigest()[:16], 16) < 0.2 * 2**64


def weights(run: Run, step: int) -> torch.nn.Module:
    """The whole model with the weights of a checkpoint, read by torch alone."""
    model = build_model(MODEL)
    values = {name: torch.full_like(value, math.nan) for name, value in model.named_parameters()}
    torch_checkpoint.load(values, checkpoint_id=run.store.folder(step), no_dist=True)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(values[name])
    return model


@torch.no_grad()
def row_loss(model: torch.nn.Module, stream: np.ndarray, row: int) -> float:
    """Mean over the row's tokens of -log of the softmax at the token that comes next."""
    inputs = stream[row * LENGTH : (row + 1) * LENGTH]
    targets = stream[row * LENGTH + 1 : (row + 1) * LENGTH + 1]
    logits = model(torch.from_numpy(inputs)[None])[0].double().numpy()
    logits -= logits.max(1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return float(-np.mean([logs[position, target] for position, target in enumerate(targets)]))


def evaluate(trained: Trained, layout: str, *overrides: str) -> dict[str, Any]:
    path = trained.run.folder / "reports" / "heldout.json"
    path.unlink(missing_ok=True)
    layout_overrides, world = LAYOUTS[layout]
    done = finish(trained.home, *EVALUATE, *layout_overrides, "name=run", *overrides, world=world)
    report: dict[str, Any] = json.loads(path.read_text())
    assert f"{report['loss']:.4f} nats per token" in done.out
    return report


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_held_out_sequence_counts_once_on_every_layout(layout: str, trained: Trained) -> None:
    rows = len(trained.row_losses)
    assert rows % 2 == 1 and rows % 8 != 0  # neither two processes nor micro-batches of 8 divide them
    assert trained.row_losses.std() > 0.01  # a row too many or too few would show
    report = evaluate(trained, layout)
    assert report["sequences"] == rows
    assert report["tokens"] == rows * LENGTH
    assert report["loss"] == pytest.approx(trained.row_losses.mean(), abs=2e-6)


def test_the_report_says_what_was_read_and_what_it_cost(trained: Trained) -> None:
    report = evaluate(trained, "single")
    tokens, size_bytes = len(trained.stream), sum(map(len, trained.documents))
    loss = trained.row_losses.mean()
    assert report.pop("loss") == pytest.approx(loss, abs=2e-6)
    assert report.pop("perplexity") == pytest.approx(math.exp(loss), rel=2e-6)
    assert report.pop("bits_per_byte") == pytest.approx(loss * tokens / size_bytes / math.log(2), rel=1e-6)
    read = len(trained.row_losses) * LENGTH
    assert report.pop("bytes") == round(read * size_bytes / tokens)
    assert report.pop("seconds") > 0
    assert report == {
        "tokens": read,
        "sequences": len(trained.row_losses),
        "documents": "joined",
        "carry_state": False,
        "step": STEPS,
        "checkpoint": str(trained.run.store.folder(STEPS)),
    }


def test_a_limit_reads_that_many_sequences_spread_over_the_text(trained: Trained) -> None:
    rows = len(trained.row_losses)
    report = evaluate(trained, "data2", "evaluation.max_sequences=7")
    assert report["sequences"] == 7
    wanted = trained.row_losses[[number * rows // 7 for number in range(7)]].mean()
    assert report["loss"] == pytest.approx(wanted, abs=2e-6)
    assert abs(wanted - trained.row_losses.mean()) > 1e-5


def test_a_damaged_checkpoint_is_passed_over(trained: Trained) -> None:
    spare = trained.run.folder.with_name("damaged")
    shutil.copytree(trained.run.folder, spare)
    run = Run(spare)
    os.truncate(run.store.folder(4) / "__0_0.distcp", 100)
    done = finish(trained.home, *EVALUATE, *SINGLE, "name=damaged", "evaluation.max_sequences=1")
    assert "__0_0.distcp has 100 bytes" in done.out
    report = json.loads((spare / "reports" / "heldout.json").read_text())
    assert report["step"] == 2
    assert report["loss"] == pytest.approx(row_loss(weights(run, 2), trained.stream, 0), abs=2e-6)


def test_a_run_without_a_checkpoint_is_refused(trained: Trained) -> None:
    never = command_line.run(*EVALUATE, *SINGLE, "name=never", cwd=trained.home)
    assert (never.returncode, never.stdout) == (4, "")
    assert never.stderr.startswith("titans-dist: runs/never has no checkpoint to evaluate; ")
    assert never.stderr.count("\n") == 1
    assert not (trained.home / "runs" / "never").exists()

    (trained.home / "runs" / "killed" / "checkpoints" / "step_00000002.tmp").mkdir(parents=True)
    code, line = refusal(trained.home, *EVALUATE, *SINGLE, "name=killed")
    assert code == 4
    assert line.endswith("runs/killed has no checkpoint; train it first with the same name")


def test_another_model_than_that_of_the_checkpoint_is_refused(trained: Trained) -> None:
    code, line = refusal(trained.home, *EVALUATE, *TENSOR_2, "model.hidden_size=64", "name=run", world=2)
    assert code == 4
    assert "holds another run: model.hidden_size=64 (it was 32), " in line


def test_a_signal_stops_between_two_batches_on_all_processes(trained: Trained) -> None:
    report = trained.run.folder / "reports" / "heldout.json"
    report.unlink(missing_ok=True)

    def before(rank: int) -> None:
        from titans_dist.parallel.scorer import Scorer

        load = Scorer.load

        def signalled(scorer: Scorer, loaded: dict[str, Any]) -> None:
            load(scorer, loaded)
            if rank == 1:
                signal.raise_signal(signal.SIGTERM)

        mock.patch.object(Scorer, "load", signalled).start()

    with job(trained.home, *EVALUATE, *DATA_2, "name=run", world=2, before=before) as stopped:
        assert stopped.wait() == [3, 3]
    assert stopped.err == "titans-dist: stopped by SIGTERM before the evaluation was over; start it again\n"
    assert not report.exists()
