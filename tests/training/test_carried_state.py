"""`titans-dist train training.carry_state=true data.documents=packed`: killed, moved and evaluated."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint

from tests.training.conftest import LAYOUTS, rewound
from tests.training.jobs import SIZES, STEPS, TENSOR_2, TEXT, Run, finish, job, refusal
from tests.training.moments import hold_before_step
from tests.training.test_resume import last_weights
from titans_data import MdsSource
from titans_dist.config import MemoryConfig, ModelConfig
from titans_dist.model import build_model

LENGTH = 32
CARRIED = (*TEXT, *SIZES, "training.carry_state=true", "data.documents=packed")
EVALUATE = ("evaluate", *CARRIED, "evaluation.micro_batch_size=4")


@pytest.fixture(scope="module")
def unbroken(home: Path) -> Callable[[str], Run]:
    """unbroken("tensor2") is the run of that layout that nothing ever disturbed."""
    runs: dict[str, Run] = {}

    def run(layout: str) -> Run:
        if layout not in runs:
            overrides, world = LAYOUTS[layout]
            finish(home, "train", *CARRIED, *overrides, f"name=carried-{layout}", world=world)
            runs[layout] = Run(home / "runs" / f"carried-{layout}")
        return runs[layout]

    return run


@pytest.mark.parametrize("layout", ["tensor2", "data2"])
def test_every_loss_and_the_state_are_bit_equal_after_a_kill(
    layout: str, home: Path, unbroken: Callable[[str], Run], name: str
) -> None:
    overrides, world = LAYOUTS[layout]
    train = ("train", *CARRIED, *overrides, f"name={name}")
    run = Run(home / "runs" / name)
    with job(home, *train, world=world, before=hold_before_step(7)) as killed:
        killed.wait_until(lambda: 6 in run.steps and run.store.committed() == [4])
        killed.kill()
        assert killed.wait() == [-signal.SIGKILL] * world
    finish(home, *train, world=world)
    assert run.after_resume() == list(range(5, STEPS + 1))
    assert run.curve == unbroken(layout).curve
    assert last_weights(run) == last_weights(unbroken(layout))


def test_the_carried_state_is_in_the_checkpoint(unbroken: Callable[[str], Run]) -> None:
    store = unbroken("tensor2").store
    index = torch_checkpoint.FileSystemReader(store.folder(STEPS)).read_metadata().state_dict_metadata
    # All lanes and all heads: 8 sequences; 4 heads of 8; a window of 8 sees 7 tokens back.
    assert index["carried.layers.1.memory.memory.weights.0"].size == (8, 4, 8, 8)
    assert index["carried.layers.0.attention.k"].size == (8, 7, 4, 8)


@pytest.mark.parametrize("layout", ["data2", "single"])
def test_another_layout_goes_on_with_the_state(
    layout: str, home: Path, unbroken: Callable[[str], Run], name: str
) -> None:
    run = rewound(unbroken("tensor2"), name, 4)
    overrides, world = LAYOUTS[layout]
    finish(home, "train", *CARRIED, *overrides, "training.micro_batch_size=2", f"name={name}", world=world)
    assert run.after_resume() == list(range(5, STEPS + 1))
    assert run.losses == pytest.approx(unbroken("tensor2").losses, abs=1e-4)


def test_a_run_does_not_begin_or_end_to_carry_its_state_half_way(home: Path, unbroken: Callable[[str], Run]) -> None:
    run = unbroken("tensor2")
    forgetful = (*TEXT, *SIZES, "data.documents=packed", *TENSOR_2)
    code, line = refusal(home, "train", *forgetful, f"name={run.folder.name}", world=2)
    assert code == 4
    assert "holds another run: training.carry_state=False (it was True)" in line


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.documents=joined", "data.documents=joined does not; use data.documents=packed"),
        ("data.sequence_length=40", "data.sequence_length=40 is no multiple of model.memory.chunk_size=16"),
        ("variant=transformer", "not possible with model.variant=transformer"),
    ],
)
def test_what_cannot_be_carried_is_refused(override: str, words: str, home: Path, name: str) -> None:
    code, line = refusal(home, "train", *CARRIED, *TENSOR_2, f"name={name}", override)
    assert code == 2
    assert words in line


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "context2"])  # carries no state
def test_held_out_text_is_scored_as_one_pass_over_the_stream(
    layout: str, home: Path, unbroken: Callable[[str], Run]
) -> None:
    run = unbroken("tensor2")
    overrides, world = LAYOUTS[layout]
    finish(home, *EVALUATE, *overrides, f"name={run.folder.name}", world=world)
    report = json.loads((run.folder / "reports" / "heldout.json").read_text())
    source = MdsSource(home / "data" / "bytes", "validation")
    tokens, documents = source.read(0, source.num_tokens)
    rows = (source.num_tokens - 1) // LENGTH
    assert report["tokens"] == rows * LENGTH
    assert (report["documents"], report["carry_state"]) == ("packed", True)
    assert report["loss"] == pytest.approx(one_pass(run, tokens, documents, rows * LENGTH), abs=1e-5)


@torch.no_grad()
def one_pass(run: Run, tokens: np.ndarray, documents: np.ndarray, count: int) -> float:
    """Mean loss of the first `count` targets: the last checkpoint's model reads the stream once, documents apart."""
    model = build_model(
        ModelConfig(
            vocab_size=320,
            num_layers=2,
            hidden_size=32,
            num_heads=4,
            window=8,
            persistent_tokens=2,
            memory=MemoryConfig(chunk_size=16, expansion=1),
        )
    )
    values = {name: torch.full_like(value, math.nan) for name, value in model.named_parameters()}
    torch_checkpoint.load(values, checkpoint_id=run.store.folder(STEPS), no_dist=True)
    model.load_state_dict(values, strict=False)
    stream, starts = torch.from_numpy(tokens[: count + 1])[None], torch.from_numpy(np.diff(documents, prepend=-1) > 0)
    logits = model(stream[:, :-1], starts=starts[None, :count])
    return torch.nn.functional.cross_entropy(logits.mT, stream[:, 1:]).item()
