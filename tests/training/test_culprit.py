"""When numbers stop being finite, the error names the part of the model that was the first, on every layout."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from tests.training.jobs import DATA_2, SINGLE, SIZES, TENSOR_2, TEXT, Run, job
from tests.training.moments import Before

AT_ONCE = ("health.skips=0", "health.lower_lr=1", "health.rollbacks=0")
TRAIN = ("train", *TEXT, *SIZES, "checkpoint.interval=2", *AT_ONCE)
STEP = 3


def poison(rank: int, path: str, what: str) -> Before:
    """Before `STEP`, spoil the module `path` of `rank`: its `output`, or the `gradient` of its output."""

    class Spoiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * math.nan if what == "output" else x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * math.inf

    def spoil(module: nn.Module, inputs: Any, output: Any) -> Any:
        return (Spoiled.apply(output[0]), *output[1:]) if isinstance(output, tuple) else Spoiled.apply(output)

    def before(here: int) -> None:
        from titans_dist.parallel.engine import Engine, StepResult

        take, numbers = Engine.step, itertools.count(1)

        def step(engine: Engine, batches: list[Any], *more: Any) -> StepResult:
            if next(numbers) == STEP and here == rank:
                engine.stages[0].model.get_submodule(path).register_forward_hook(spoil)
            return take(engine, batches, *more)

        mock.patch.object(Engine, "step", step).start()

    return before


def said(home: Path, name: str, *layout: str, world: int, before: Before) -> str:
    """What a run says that must end at `STEP` with exit code 5 in every process."""
    with job(home, *TRAIN, *layout, f"name={name}", world=world, before=before) as failed:
        assert failed.wait() == [5] * world, failed.err
    run = Run(home / "runs" / name)
    assert run.steps == [1, 2, 3]
    assert run.store.committed() == [2]
    (line,) = failed.err.splitlines()
    start, end = "titans-dist: step 3 is unhealthy (", "), and so were steps before it; the last checkpoint is sound"
    assert line.startswith(start) and end in line
    return line.partition(end)[0].partition("(")[2].partition(": ")[2]


@pytest.mark.parametrize("path", ["blocks.1.mixer.memory.memory", "blocks.0.mlp.up", "embedding"])
def test_the_first_output_that_is_not_finite(path: str, home: Path, name: str) -> None:
    sentence = said(home, name, *SINGLE, world=1, before=poison(0, path, "output"))
    assert sentence == f"the first output that is not finite is that of {path}"


@pytest.mark.parametrize("layout", [TENSOR_2, DATA_2], ids=["tensor", "data"])
def test_what_one_process_alone_has_is_found_by_all(layout: tuple[str, ...], home: Path, name: str) -> None:
    path = "blocks.1.mixer.memory.memory.gates.theta"
    sentence = said(home, name, *layout, world=2, before=poison(1, path, "output"))
    assert sentence == f"the first output that is not finite is that of {path} in process 1"


def test_a_gradient_that_is_not_finite_where_every_output_is(home: Path, name: str) -> None:
    sentence = said(home, name, *TENSOR_2, world=2, before=poison(0, "blocks.0.mlp.down", "gradient"))
    wanted = "every output is finite; backward from the loss, the first gradient that is not is that of "
    assert sentence.startswith(wanted + "blocks.0.mlp.down.weight")


def test_a_failed_step_changes_no_parameter() -> None:
    def rank_main(rank: int, world: int) -> bool:
        from megatron.core import parallel_state

        from tests.parallel.test_engine import CONFIG, rows
        from titans_dist.parallel import cpu
        from titans_dist.parallel.engine import Engine

        cpu.install()
        parallel_state.initialize_model_parallel(1)
        engine = Engine(CONFIG, torch.device("cpu"))
        micro_batches = [{"tokens": rows(0)}]
        engine.step(micro_batches)
        before = [value.detach().clone() for value in engine.stages[0].model.parameters()]
        hook = engine.stages[0].model.embedding.register_forward_hook(lambda module, inputs, y: y * math.nan)
        assert math.isnan(engine.step(micro_batches).grad_norm)
        assert all(map(torch.equal, before, engine.stages[0].model.parameters()))
        hook.remove()
        engine.step(micro_batches)  # goes on from moments that are as sound as the parameters
        return all(value.isfinite().all() for value in engine.stages[0].model.parameters())

    from tests.distributed import run_distributed

    assert run_distributed(rank_main, 1) == [True]
