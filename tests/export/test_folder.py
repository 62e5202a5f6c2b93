"""What `titans-dist checkpoint export` writes, of which checkpoint, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tests.export import exports
from tests.model.models import MODELS
from titans_dist.checkpoint.store import Store
from titans_dist.checkpoint.tensors import Tensors
from titans_dist.config import CheckpointError, Config, ConfigError
from titans_dist.export import Exported, export
from titans_launch.cli import main

Output = pytest.CaptureFixture[str]
MODEL = MODELS["mag"]


@pytest.fixture
def run(tmp_path: Path) -> Config:
    """A run with a checkpoint of exports.STEP."""
    made = exports.config(tmp_path / "runs" / "mine", MODEL)
    exports.checkpoint(made, exports.random_model(MODEL))
    return made


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_small_files_hold_what_one_file_holds(run: Config) -> None:
    run.export.path = f"{run.run_dir}/whole"
    whole = export(run, exports.STEP).folder
    run.export.path, run.export.shard_gb = f"{run.run_dir}/cut", 4e-6
    cut = export(run, exports.STEP).folder
    assert [path.name for path in whole.glob("*.safetensors*")] == ["model.safetensors"]
    files = sorted(cut.glob("*.safetensors"))
    assert [path.name for path in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    for path in files:
        held = load_file(path)
        assert len(held) == 1 or sum(value.nbytes for value in held.values()) <= 4000
        with safe_open(path, "pt") as tensors:
            assert tensors.metadata() == {"format": "pt"}
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    one, many = weights(whole), weights(cut)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in one.values())
    assert {name: name in load_file(cut / file) for name, file in index["weight_map"].items()} == dict.fromkeys(
        one, True
    )
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)


def test_no_more_than_one_file_is_in_memory(run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by the tensors that were read and are still there, at each read."""
    limit, live, most = 4000, 0, 0
    largest = max(value.numel() * 4 for value in exports.random_model(MODEL).parameters())
    read = Tensors.read

    def counted(tensors: Tensors, name: str) -> Tensor:
        nonlocal live, most
        value = read(tensors, name)
        size = value.nbytes

        def gone() -> None:
            nonlocal live
            live -= size

        live += size
        most = max(most, live)
        weakref.finalize(value, gone)
        return value

    monkeypatch.setattr(Tensors, "read", counted)
    run.export.shard_gb = limit / 1e9
    export(run, exports.STEP)
    assert largest <= most <= limit + largest


def test_a_tied_head_is_written_once_and_an_untied_one_beside_the_embedding(tmp_path: Path) -> None:
    for name, tied in (("mag", True), ("mag_without_persistent", False)):
        _, done = exports.exported(tmp_path / name, MODELS[name])
        assert ("model.head.weight" not in weights(done.folder)) == tied
        assert json.loads((done.folder / "config.json").read_text())["tie_word_embeddings"] == tied


def test_the_sums_are_those_of_all_files(run: Config) -> None:
    folder = export(run, exports.STEP).folder
    lines = [line.split("  ") for line in (folder / "SHA256SUMS").read_text().splitlines()]
    assert {name for _, name in lines} == {path.name for path in folder.iterdir()} - {"SHA256SUMS"}
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest for digest, name in lines)


def test_the_weights_can_be_read_by_whom_the_other_files_can(run: Config) -> None:
    folder = export(run, exports.STEP).folder
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_the_card_says_what_the_checkpoint_says(run: Config) -> None:
    card = (export(run, exports.STEP).folder / "README.md").read_text()
    for fact in (
        "# mine",
        f"step\n{exports.STEP} of its training",
        "| variant | mag |",
        "| blocks | 2 of width 16, MLP 16 |",
        "| tokens seen | 1,234 |",
        "| last training loss | 2.5000 nats per token |",
        "| weights | float32 |",
        "| tokenizer | none: data=synthetic says of none |",
    ):
        assert fact in card, fact


def test_an_export_that_breaks_off_leaves_nothing(run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    read, names = Tensors.read, []

    def breaks(tensors: Tensors, name: str) -> Tensor:
        names.append(name)
        if len(names) == 5:
            raise OSError("no space left on device")
        return read(tensors, name)

    monkeypatch.setattr(Tensors, "read", breaks)
    with pytest.raises(OSError, match="no space"):
        export(run, exports.STEP)
    assert not list((Path(run.run_dir) / "export").iterdir())


def test_what_a_killed_export_has_left_is_in_nobodys_way(run: Config) -> None:
    left = Path(run.run_dir) / "export" / f"hf-{exports.STEP}.tmp"
    left.mkdir(parents=True)
    (left / "model-00001-of-00009.safetensors").write_text("half")
    done = export(run, exports.STEP)
    assert not left.exists() and not (done.folder / "model-00001-of-00009.safetensors").exists()


def test_a_folder_that_exists_is_not_touched(run: Config) -> None:
    done = export(run, exports.STEP)
    with pytest.raises(ConfigError, match="exists; remove it, or give another folder"):
        export(run, exports.STEP)
    assert isinstance(done, Exported) and done.folder.is_dir()


def test_a_checkpoint_without_a_weight_of_the_model_is_refused(run: Config) -> None:
    smaller = exports.random_model(MODELS["lmm"])
    exports.checkpoint(run, smaller, step=8)
    with pytest.raises(
        CheckpointError, match=r"has no blocks\.0\.mixer\.\S+, which the model of its configuration has"
    ):
        export(run, 8)


# The command


@pytest.fixture
def here(run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store of the run `mine` of the current folder, which has two checkpoints."""
    monkeypatch.chdir(tmp_path)
    exports.checkpoint(run, exports.random_model(MODEL, seed=2), step=9)
    return Store(Path(run.run_dir) / "checkpoints")


def exported_seed(folder: Path) -> int:
    """Whose weights they are."""
    found = weights(folder)["model.norm.weight"]
    same = [seed for seed in (1, 2) if torch.equal(found, exports.random_model(MODEL, seed=seed).norm.weight)]
    return same[0]


def test_the_newest_checkpoint_is_exported_or_the_step_that_is_asked_for(here: Store, capsys: Output) -> None:
    """The command gets no word of the model: the checkpoint says what it is."""
    assert main(["checkpoint", "export", "--format", "hf", "name=mine"]) == 0
    assert "runs/mine/export/hf-9" in capsys.readouterr().out
    assert exported_seed(Path("runs/mine/export/hf-9")) == 2
    assert main(["checkpoint", "export", "name=mine", "--step", "7", "--path", "seven"]) == 0
    assert exported_seed(Path("seven")) == 1


def test_a_flipped_byte_in_the_newest_checkpoint_is_told_and_the_one_before_it_exported(
    here: Store, capsys: Output
) -> None:
    damaged = next(here.folder(9).glob("*.distcp"))
    flip(damaged)
    assert main(["checkpoint", "export", "name=mine", "--path", "out"]) == 0
    assert f"the content of {damaged.name} has changed; trying the one before it" in capsys.readouterr().err
    assert exported_seed(Path("out")) == 1


def test_a_damaged_checkpoint_that_is_asked_for_is_refused(here: Store, capsys: Output) -> None:
    damaged = next(here.folder(9).glob("*.distcp"))
    flip(damaged)
    assert main(["checkpoint", "export", "name=mine", "--step", "9", "--path", "out"]) == 4
    assert f"the content of {damaged.name} has changed" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["name=none"], 4, "runs/none has no checkpoints"),
        (
            ["name=mine", "--step", "8"],
            4,
            "runs/mine/checkpoints has no checkpoint of step 8; there is one of step 7, 9",
        ),
        (["name=mine", "--format", "deepspeed"], 2, "export.format=deepspeed is none that checkpoint export writes"),
        (["name=mine", "--path", "runs"], 2, "exists; remove it, or give another folder"),
    ],
)
def test_refusals(arguments: list[str], code: int, sentence: str, here: Store, capsys: Output) -> None:
    assert main(["checkpoint", "export", *arguments]) == code
    assert sentence in capsys.readouterr().err
