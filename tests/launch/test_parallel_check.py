"""`titans-dist parallel-check`: the verdict on a layout, and that it can be a bad one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.launch import command_line
from tests.training.jobs import job

SMALL = ("model.num_heads=4", "model.memory.chunk_size=16", "data.sequence_length=64", "model.segment_length=16")


def verdict(folder: Path, *overrides: str, world: int, before: Callable[[int], None] | None = None) -> tuple[int, str]:
    with job(folder, "parallel-check", *SMALL, *overrides, world=world, before=before) as done:
        codes = done.wait()
        return codes[0], done.out + done.err


def test_a_layout_on_this_machine_agrees(tmp_path: Path) -> None:
    layout = ("parallel.tensor=2", "parallel.context=2", "parallel.pipeline=2")
    done = command_line.run("parallel-check", *layout, *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mag on 8 processes = tensor 2 x context 2 x pipeline 2 x data 1" in done.stdout
    assert len(re.findall(r"(?:loss|gradient norm) at step \d .* ok ", done.stdout)) == 6
    assert "gradient of blocks.*." in done.stdout
    assert done.stdout.rstrip().endswith("the layout equals one process")
    assert "WRONG" not in done.stdout


def test_a_ring_says_how_long_its_processes_wait(tmp_path: Path) -> None:
    ring = ("variant=lmm", "parallel.tensor=1", "parallel.context=2", "parallel.context_mode=ring")
    code, out = verdict(tmp_path, *ring, "parallel.context_groups=8", world=2)
    assert code == 0, out
    assert "each process of the ring waits 11.1% of its turns; by the formula 11.1%" in out


@pytest.mark.parametrize("overrides", [("variant=mac", "parallel.pipeline=2"), ("data.documents=packed",)])
def test_other_models_and_packed_documents_agree(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    code, out = verdict(tmp_path, "parallel.tensor=1", "parallel.context=2", *overrides, world=2 * len(overrides))
    assert code == 0, out


def forget_the_tokens_before(rank: int) -> None:
    from titans_dist.parallel.context import layers

    real = layers.tokens_before

    def forgetful(*arguments: Any) -> Any:
        return real(*arguments) * 0

    mock.patch.object(layers, "tokens_before", forgetful).start()


def count_a_gradient_twice(rank: int) -> None:
    from titans_dist.parallel import check

    real = check.finalize_model_grads

    def twice(model: Any, *arguments: Any, **named: Any) -> None:
        real(model, *arguments, **named)
        for chunk in model:
            for name, value in chunk.named_parameters():
                if name.endswith("mlp.down.weight"):
                    value.main_grad *= 2

    mock.patch.object(check, "finalize_model_grads", twice).start()


@pytest.mark.parametrize(
    ("mistake", "named"),
    [(forget_the_tokens_before, "loss at step 1"), (count_a_gradient_twice, "gradient of blocks.*.mlp.down.weight")],
)
def test_a_mistake_is_found(tmp_path: Path, mistake: Callable[[int], None], named: str) -> None:
    code, out = verdict(tmp_path, "parallel.tensor=1", "parallel.context=2", world=2, before=mistake)
    assert code == 1
    assert "DIFFERS from one process: " in out and named in out.split("DIFFERS from one process: ")[1]


def test_processes_that_do_not_fill_the_layout_are_refused(tmp_path: Path) -> None:
    code, out = verdict(tmp_path, "parallel.tensor=1", "parallel.context=4", world=2)
    assert code == 2
    assert "2 processes do not fit parallel.tensor=1 x parallel.context=4; use a multiple of 4 processes" in out
