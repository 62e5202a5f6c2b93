"""An export becomes the first checkpoint of a new run: the same weights, an optimizer that has not made a step."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.config.test_composition import composed
from tests.export import clean, exports, save_again
from tests.model.models import MODELS, tokens
from tests.training import jobs
from tests.training.jobs import Run
from titans_data import prepare
from titans_dist.checkpoint.lease import Lease
from titans_dist.checkpoint.tensors import Tensors
from titans_dist.config import ModelConfig
from titans_dist.config.sizes import parameter_count
from titans_dist.model import LanguageModel
from titans_launch.prepare import options

MOST = ("mag", "mag_without_persistent", "mac", "lmm_tnt", "lmm_channel_wise", "transformer")
"""Tied and untied, two memories in a layer, channels, and no memory at all."""
FIXED = ("data=synthetic", "data.vocab_size=32", "data.sequence_length=32", "training.global_batch_size=2")
OVERRIDES = (*FIXED, "training.micro_batch_size=1", "name=new", "parallel.tensor=1")


def overrides(model: ModelConfig) -> list[str]:
    """The command line's words for a model."""

    def words(prefix: str, values: dict[str, Any]) -> list[str]:
        found = []
        for key, value in values.items():
            if isinstance(value, dict):
                found += words(f"{prefix}{key}.", value)
            else:
                found.append(f"{prefix}{key}={'null' if value is None else str(value).lower()}")
        return found

    return words("model.", dataclasses.asdict(model))


def imported(folder: Path, export: Path, *more: str, world: int = 1) -> Tensors:
    """The first checkpoint of the run `new` in `folder`."""
    jobs.finish(folder, "checkpoint", "import", "--path", str(export), *OVERRIDES, *more, world=world)
    run = Run(folder / "runs" / "new")
    run.store.verify(0)
    return Tensors(run.store.folder(0))


def weights(model: LanguageModel) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters()}


def check(found: Tensors, wanted: dict[str, Tensor], masters: dict[str, Tensor]) -> None:
    """The model's weights, float32 masters and moments of zeros, under the names that training has for them."""
    of_model = {name for name in found.names if not name.startswith(("optimizer.", "rng."))}
    assert of_model == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found.read(name), value) and found.dtype(name) == value.dtype
        assert torch.equal(found.read(f"optimizer.state.param.{name}"), masters[name])
        for moment in ("exp_avg", "exp_avg_sq"):
            read = found.read(f"optimizer.state.{moment}.{name}")
            assert read.dtype == torch.float32 and read.shape == value.shape and not read.any()


@pytest.mark.parametrize("name", [n if n in MOST else pytest.param(n, marks=pytest.mark.matrix) for n in MODELS])
def test_what_was_exported_comes_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    model, done = exports.exported(tmp_path / "old", MODELS[name])
    found = imported(tmp_path, done.folder, *overrides(MODELS[name]))
    check(found, weights(model), weights(model))
    again = LanguageModel(MODELS[name])
    again.load_state_dict({key: found.read(key) for key in weights(model)}, strict=not MODELS[name].tie_embeddings)
    with torch.no_grad():
        assert torch.equal(again(tokens()), model(tokens()))


@pytest.mark.parametrize("layout", [("parallel.tensor=2",), ("parallel.pipeline=2",), ("parallel.data=2",)])
def test_every_process_of_a_layout_reads_its_part(layout: tuple[str, ...], tmp_path: Path) -> None:
    model, done = exports.exported(tmp_path / "old", MODELS["mag"])
    found = imported(tmp_path, done.folder, *overrides(MODELS["mag"]), *layout, world=2)
    check(found, weights(model), weights(model))


def test_a_bfloat16_run_keeps_the_float32_weights_as_its_masters(tmp_path: Path) -> None:
    model, done = exports.exported(tmp_path / "old", MODELS["mag"])
    found = imported(tmp_path, done.folder, *overrides(MODELS["mag"]), "training.precision=bfloat16")
    check(found, {name: value.bfloat16() for name, value in weights(model).items()}, weights(model))


def test_a_float32_run_takes_a_bfloat16_export_as_it_is(tmp_path: Path) -> None:
    model, done = exports.exported(tmp_path / "old", MODELS["mag"], torch.bfloat16)
    wanted = {name: value.float() for name, value in weights(model).items()}
    check(imported(tmp_path, done.folder, *overrides(MODELS["mag"])), wanted, wanted)


def test_weights_in_many_files_are_those_of_one(tmp_path: Path) -> None:
    model = exports.random_model(MODELS["mag"])
    run = exports.config(tmp_path / "old", MODELS["mag"])
    exports.checkpoint(run, model)
    run.export.shard_gb = 4e-6
    done = exports.export(run, exports.STEP)
    assert len(list(done.folder.glob("*.safetensors"))) > 3
    check(imported(tmp_path, done.folder, *overrides(MODELS["mag"])), weights(model), weights(model))


def test_what_transformers_has_saved_again_is_read_too(tmp_path: Path) -> None:
    """After a fine-tuning elsewhere, say: in files as `save_pretrained` cuts them, with the code beside them."""
    model, done = exports.exported(tmp_path / "old", MODELS["mag"])
    python, again = clean.linked(tmp_path / "clean"), tmp_path / "again"
    clean.run(python, Path(save_again.__file__), str(done.folder), str(again), home=tmp_path)
    assert len(list(again.glob("*.safetensors"))) > 1 and (again / "memory_spec.py").is_file()
    wanted = {name: value.clone() for name, value in weights(model).items()}
    wanted["norm.weight"] += 1
    check(imported(tmp_path, again, *overrides(MODELS["mag"])), wanted, wanted)


def test_training_and_evaluation_go_on_from_it(tmp_path: Path) -> None:
    """The new run reads the old one's text: it scores the same, and its first step begins where the old one ended."""
    jobs.corpus(tmp_path / "text")
    given = (*jobs.TEXT, *jobs.SIZES, *jobs.SINGLE)
    data = composed(*jobs.TEXT).data
    data.source, data.path = str(tmp_path / "text"), str(tmp_path / "data" / "bytes")
    prepare(options(data), data.path)
    jobs.finish(tmp_path, "train", *given, "name=old")
    jobs.finish(tmp_path, "evaluate", *given, "name=old")
    jobs.finish(tmp_path, "checkpoint", "export", *given, "name=old")
    export = tmp_path / "runs" / "old" / "export" / f"hf-{jobs.STEPS}"
    jobs.finish(tmp_path, "checkpoint", "import", "--path", str(export), *given, "name=new")
    jobs.finish(tmp_path, "evaluate", *given, "name=new")
    old, new = (
        json.loads((tmp_path / "runs" / name / "reports" / "heldout.json").read_text()) for name in ("old", "new")
    )
    assert (new["step"], new["loss"]) == (0, old["loss"])
    jobs.finish(tmp_path, "train", *given, "name=new")
    before, after = (Run(tmp_path / "runs" / name) for name in ("old", "new"))
    assert after.steps == list(range(1, jobs.STEPS + 1))
    # Text and order of the rows are the old run's from the start, so what it learned shows at once.
    assert after.losses[1] < min(before.losses[step] for step in (1, 2, 3)) - 0.5
    assert after.losses[jobs.STEPS] < before.losses[jobs.STEPS]
    assert Tensors(after.store.folder(jobs.STEPS)).shape("embedding.weight") == (320, 32)


# Refusals


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return exports.exported(tmp_path / "old", MODELS["mag"])[1].folder


def refused(folder: Path, export: Path, *more: str) -> tuple[int, str]:
    return jobs.refusal(folder, "checkpoint", "import", "--path", str(export), *OVERRIDES, *more)


def test_another_architecture_is_refused_with_what_differs(tmp_path: Path, export: Path) -> None:
    changed = dataclasses.replace(MODELS["mag"], num_layers=3, rope_theta=500.0)
    changed.memory = dataclasses.replace(changed.memory, chunk_size=8)
    assert refused(tmp_path, export, *overrides(changed)) == (
        4,
        f"titans-dist: {export} holds another model: model.num_layers=3 (there 2), model.rope_theta=500.0 (there "
        "10000.0), model.memory.chunk_size=8 (there 4); give the export's values as overrides",
    )
    assert not (tmp_path / "runs" / "new" / "checkpoints").exists()


def test_a_flipped_byte_is_found_and_named(tmp_path: Path, export: Path) -> None:
    for name in ("model.safetensors", "modeling_titans.py"):
        path = export / name
        content = path.read_bytes()
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        code, line = refused(tmp_path, export, *overrides(MODELS["mag"]))
        assert code == 4 and f"{path} is damaged or was changed" in line
        path.write_bytes(content)
    assert imported(tmp_path, export, *overrides(MODELS["mag"])).names


def test_a_run_that_is_being_trained_is_refused(tmp_path: Path, export: Path) -> None:
    root = tmp_path / "runs" / "new" / "checkpoints"
    lease = Lease.acquire(root)
    try:
        code, line = refused(tmp_path, export, *overrides(MODELS["mag"]))
    finally:
        lease.release()
    assert code == 4 and f"is training this run and writes {root}" in line
    assert not Run(tmp_path / "runs" / "new").store.committed()


def test_a_run_with_checkpoints_is_refused(tmp_path: Path, export: Path) -> None:
    imported(tmp_path, export, *overrides(MODELS["mag"]))
    code, line = refused(tmp_path, export, *overrides(MODELS["mag"]))
    assert code == 4 and "has checkpoints already" in line


@pytest.mark.parametrize("damage", ["lacks", "reshaped"])
def test_weights_that_are_not_the_models_are_refused(damage: str, tmp_path: Path, export: Path) -> None:
    (export / "SHA256SUMS").unlink()  # whoever changes the weights does this
    path = export / "model.safetensors"
    held = load_file(path)
    last = held.pop("model.norm.weight")
    save_file(held if damage == "lacks" else held | {"model.norm.weight": last[:8].clone()}, path, {"format": "pt"})
    sentence = {
        "lacks": f"{export} has no model.norm.weight, which the model needs",
        "reshaped": f"model.norm.weight is (8,) in {export}, but the model needs (16,)",
    }[damage]
    assert refused(tmp_path, export, *overrides(MODELS["mag"])) == (4, f"titans-dist: {sentence}")


def test_what_is_no_export_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, line = refused(tmp_path, tmp_path / "empty", *overrides(MODELS["mag"]))
    assert code == 4 and "is no export: config.json cannot be read" in line
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama"}')
    code, line = refused(tmp_path, tmp_path / "empty", *overrides(MODELS["mag"]))
    assert code == 4 and "is of a llama model; only exports of titans-dist can be imported" in line
    code, line = jobs.refusal(tmp_path, "checkpoint", "import", *OVERRIDES)
    assert code == 2 and line.endswith("add --path FOLDER (export.path=FOLDER)")


def test_the_parameters_are_those_of_the_card(export: Path) -> None:
    assert f"with {parameter_count(MODELS['mag']):,} parameters" in (export / "README.md").read_text()
