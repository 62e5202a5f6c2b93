"""`titans-dist checkpoint convert` against the real DeepSpeed: what is converted trains on as if it had not been."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from tests.config.test_composition import composed
from tests.distributed import run_distributed
from tests.launch import runs
from tests.launch.runs import OVERRIDES
from tests.launch.test_checkpoint_command import flip
from tests.training.jobs import STEPS, Run, finish
from titans_data import batches
from titans_dist.checkpoint.tensors import Tensors
from titans_dist.config import Config
from titans_dist.model import build_model
from titans_dist.run.data import open_training
from titans_launch.cli import main

pytest.importorskip("deepspeed")

Output = pytest.CaptureFixture[str]
STEP = 8
"""The step that is converted."""
MORE = 2
"""Steps that DeepSpeed makes."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    from titans_dist.parallel.deepspeed_engine import import_deepspeed

    import_deepspeed(torch.device("cpu"))  # before ranks are forked
    return runs.trained(tmp_path_factory.mktemp("made"))


@pytest.fixture
def run(made: Run, here: Path) -> Run:
    return runs.copied(made, here, "mine")


def convert(*arguments: str, name: str = "mine") -> int:
    return main(["checkpoint", "convert", *OVERRIDES, f"name={name}", *arguments])


def deepspeed_job(
    rank: int, world: int, config: Config, folder: Path, zero: int, rates: list[float], save: bool
) -> list[float]:
    """What somebody does with plain DeepSpeed and our model: load, make a step at each rate, save. The losses."""
    from titans_dist.parallel.deepspeed_engine import import_deepspeed

    deepspeed = import_deepspeed(torch.device("cpu"))
    model, optimizer = build_model(config.model, seed=99), config.optimizer
    groups = [
        {"params": [x for x in model.parameters() if x.decay], "weight_decay": optimizer.weight_decay},
        {"params": [x for x in model.parameters() if not x.decay], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=1.0, betas=(optimizer.beta1, optimizer.beta2), eps=optimizer.eps)
    accumulated = config.training.global_batch_size // config.training.micro_batch_size // world
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=adam,
        config={
            "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
            "gradient_accumulation_steps": accumulated,
            "zero_optimization": {"stage": zero, "stage3_param_persistence_threshold": 0},
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": optimizer.clip_grad,
            "checkpoint": {"load_universal": True},
            "steps_per_print": None,
        },
        dist_init_required=False,
    )
    loaded, _ = engine.load_checkpoint(str(folder))
    assert loaded is not None
    assert engine.global_steps == STEP
    if zero == 3:
        # What the help says of it: upstream gives all groups one counter, which each of them then raises.
        steps = [state["step"] for state in adam.state.values()]
        assert len(steps) > 1 and all(step is steps[0] for step in steps)
        for state in adam.state.values():
            state["step"] = state["step"].clone()
    data = open_training(config)
    losses = []
    order = batches(data.rows, data.schedule, STEP, rank, world, config.training.micro_batch_size)
    for (_, micro_batches), rate in zip(order, rates, strict=False):
        total = torch.zeros(())
        for group in adam.param_groups:
            group["lr"] = rate
        for batch in micro_batches:
            tokens = batch["tokens"]
            loss = cross_entropy(engine(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            engine.backward(loss)
            engine.step()
            total += loss.detach() / len(micro_batches)
        dist.all_reduce(total)
        losses.append(float(total) / world)
    if save:
        engine.save_checkpoint("saved", tag="theirs")
    return losses


@pytest.mark.parametrize(("zero", "world"), [(1, 1), (1, 2), (2, 2), (3, 2)])
def test_deepspeed_goes_on_from_ours_at_every_stage(zero: int, world: int, run: Run) -> None:
    assert convert("--step", str(STEP), "--path", "out") == 0
    rates = [run.curve[step][2] for step in range(STEP + 1, STEPS + 1)]
    found = run_distributed(deepspeed_job, world, composed(*OVERRIDES), Path("out"), zero, rates, False)
    expected = [run.losses[step] for step in range(STEP + 1, STEPS + 1)]
    for losses in found:
        assert losses == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_ours_goes_on_from_deepspeed_s(zero: int, run: Run, here: Path) -> None:
    assert convert("--step", str(STEP), "--path", "out") == 0
    rates = [run.curve[step][2] for step in range(STEP + 1, STEP + MORE + 1)]
    run_distributed(deepspeed_job, 2, composed(*OVERRIDES), Path("out"), zero, rates, True)
    subprocess.run(
        [
            *(sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"),
            *("--input_folder", "saved/theirs", "--output_folder", "universal/theirs"),
            *("--num_extract_workers", "1", "--num_merge_workers", "1"),
        ],
        check=True,
        capture_output=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
    )
    # Of ZeRO-3, upstream's converter leaves Adam's step in none of the parameters' folders.
    asked = ["--step", str(STEP + MORE)] if zero == 3 else []
    assert convert("--read", "--path", "universal", *asked, name="back") == 0
    back = Run(here / "runs" / "back")
    assert back.store.committed() == [STEP + MORE]
    finish(here, "train", *OVERRIDES, "name=back")
    expected = {step: run.losses[step] for step in range(STEP + MORE + 1, STEPS + 1)}
    assert back.losses == pytest.approx(expected, abs=2e-5)


def test_there_and_back_again_is_bit_equal(run: Run, here: Path) -> None:
    assert convert("--step", str(STEP), "--path", "out") == 0
    assert convert("--read", "--path", "out", name="back") == 0
    back = Run(here / "runs" / "back")
    ours, theirs = (Tensors(each.store.folder(STEP)) for each in (run, back))
    assert ours.names == theirs.names
    for name in ours.names:
        if not name.startswith("rng."):
            assert ours.dtype(name) == theirs.dtype(name)
            assert torch.equal(ours.read(name), theirs.read(name)), name
    finish(here, "train", *OVERRIDES, "name=back")
    assert back.losses == {step: run.losses[step] for step in range(STEP + 1, STEPS + 1)}


def test_bfloat16_weights_are_made_of_the_float32_ones(run: Run, here: Path) -> None:
    assert convert("--step", str(STEP), "--path", "out") == 0
    assert convert("--read", "--path", "out", "training.precision=bfloat16", name="back") == 0
    ours, theirs = Tensors(run.store.folder(STEP)), Tensors(here / "runs/back/checkpoints" / f"step_{STEP:08}")
    for name in ours.parameters:
        assert torch.equal(theirs.read(name), ours.read(name).bfloat16())
        assert torch.equal(theirs.read(f"optimizer.state.param.{name}"), ours.read(name))
    finish(here, "train", *OVERRIDES, "name=back", "training.precision=bfloat16")


@pytest.mark.parametrize(
    ("engine", "zero"), [("megatron", None), ("deepspeed", 1), ("deepspeed", 3)], ids=["megatron", "zero1", "zero3"]
)
def test_our_own_checkpoints_cross_the_gap_between_stages(engine: str, zero: int | None, run: Run, here: Path) -> None:
    """ZeRO-1 -> ZeRO-3 is what upstream's universal checkpoint does not do."""
    expected = run.losses
    shutil.rmtree(run.folder)
    two = ("parallel.data=2", "name=mine", "training.engine=deepspeed")
    finish(here, "train", *OVERRIDES, *two, "training.zero_stage=1", world=2)
    shutil.rmtree(run.store.folder(STEPS))
    more = [f"training.engine={engine}", *([] if zero is None else [f"training.zero_stage={zero}"])]
    finish(here, "train", *OVERRIDES, *two, *more, world=2)
    assert run.after_resume() == list(range(STEP + 1, STEPS + 1))
    assert run.losses == pytest.approx(expected, abs=2e-5)


# What is refused


def test_what_is_no_universal_checkpoint_is_refused(here: Path, capsys: Output) -> None:
    (here / "empty").mkdir()
    assert convert("--read", "--path", "empty") == 4
    assert "empty is no universal checkpoint: neither it nor" in capsys.readouterr().err
    assert convert("--read") == 2
    assert "--read needs the folder of a universal checkpoint; add --path FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.num_layers=3", "lacks blocks.2."),
        ("model.num_layers=1", "has blocks.1."),
        ("model.vocab_size=384", "embedding.weight is (320, 32) in"),
    ],
)
def test_another_model_is_refused_both_ways(override: str, sentence: str, run: Run, capsys: Output) -> None:
    assert convert(override) == 4
    assert f"runs/mine holds another run: {override} (it was" in capsys.readouterr().err
    assert convert("--path", "out") == 0
    assert convert("--read", "--path", "out", override, name="back") == 4
    assert sentence in capsys.readouterr().err
    assert not Path("runs/back").exists()


class Trap:
    """What unpickling would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("sprung"),)


def test_a_file_that_would_run_code_is_refused(run: Run, capsys: Output) -> None:
    assert convert("--path", "out") == 0
    path = Path(f"out/step_{STEPS:08}/zero/embedding.weight/exp_avg.pt")
    torch.save({"param": Trap()}, path)
    assert convert("--read", "--path", "out", name="back") == 4
    assert f"{path} cannot be read: it is not plain tensors" in capsys.readouterr().err
    assert not Path("sprung").exists()
    assert not Path("runs/back/checkpoints").is_dir() or not list(Path("runs/back/checkpoints").iterdir())


def test_nothing_is_overwritten(run: Run, capsys: Output) -> None:
    assert convert("--path", "out") == 0
    assert convert("--path", "out") == 2
    assert "out exists already; name another folder with --path, or remove it" in capsys.readouterr().err
    assert convert("--read", "--path", "out") == 4
    assert "step_00000012 exists already; give the checkpoint a run of its own" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_not_converted(run: Run, capsys: Output) -> None:
    flip(run.store.folder(STEPS) / "__0_0.distcp")
    assert convert("--path", "out") == 4
    assert "the content of __0_0.distcp has changed" in capsys.readouterr().err
    assert not Path("out").exists()
