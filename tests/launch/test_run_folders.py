"""A run's folder follows from its name, and nothing else is ever left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.launch.command_line import Cli
from titans_dist.config import Config
from titans_launch import info
from titans_launch.cli import main
from titans_launch.names import MAX_LENGTH, quote, run_name

Folders = Callable[..., list[str]]


@pytest.fixture
def folders(here: Path, monkeypatch: pytest.MonkeyPatch) -> Folders:
    """folders("name=x") are the run folders of the jobs of `titans-dist info name=x`, each there while its job runs."""
    seen: list[str] = []

    def run(config: Config) -> None:
        assert Path(config.run_dir).is_dir()
        seen.append(str(Path(config.run_dir).relative_to(here)))

    def call(*arguments: str) -> list[str]:
        assert main(["info", *arguments]) == 0
        return seen

    monkeypatch.setattr(info, "run", run)
    return call


@pytest.mark.parametrize(
    ("overrides", "folder"),
    [
        ([], "runs/quickstart"),
        (["training.steps=20", "parallel.tensor=1"], "runs/quickstart,parallel.tensor=1,training.steps=20"),
        (["name=foo", "training.steps=20"], "runs/foo"),
        (["hydra.run.dir=elsewhere/x"], "elsewhere/x"),
    ],
)
def test_folder_of_a_run(overrides: list[str], folder: str, folders: Folders) -> None:
    assert folders(*overrides) == [folder]


def test_a_path_in_an_override_does_not_become_a_path_of_the_run(folders: Folders) -> None:
    (folder,) = folders("data=text", "data.source=/some/books")
    assert folder.startswith("runs/quickstart,data.source=_some_books,data=text-")


def test_every_job_of_a_sweep_has_its_own_folder(folders: Folders) -> None:
    assert folders("-m", "training.steps=20,30", "parallel=single") == [
        "runs/quickstart,parallel=single,training.steps=20",
        "runs/quickstart,parallel=single,training.steps=30",
    ]


@pytest.mark.parametrize("arguments", [[], ["-m", "training.steps=20,30"], ["--cfg", "job"], ["name=a/b"]])
def test_commands_that_write_nothing_leave_nothing(arguments: list[str], folders: Folders, here: Path) -> None:
    folders(*arguments)
    assert not list(here.rglob("*"))


def test_cfg_prints_the_configuration(cli: Cli) -> None:
    run = cli("train", "model.hidden_size=96", "name=x", "--cfg", "job", "--resolve")
    printed = yaml.safe_load(run.stdout)
    assert printed["model"]["hidden_size"] == 96
    assert printed["run_dir"].endswith("/runs/x")
    assert run.returncode == 0


def test_files_of_the_user_extend_the_groups(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "mine" / "model").mkdir(parents=True)
    (here / "mine" / "model" / "tiny.yaml").write_text("hidden_size: 32\nnum_heads: 2\nnum_layers: 1\n")
    assert main(["train", "--config-dir", "mine", "model=tiny", "--cfg", "job"]) == 0
    assert yaml.safe_load(capfd.readouterr().out)["model"]["hidden_size"] == 32


@given(st.text(min_size=1), st.text())
def test_a_run_name_is_always_one_folder(experiment: str, overrides: str) -> None:
    name = run_name(experiment, [overrides])
    assert "/" not in name and "\0" not in name
    assert name not in (".", "..", "")
    assert len(name.encode()) <= 255 or not name.isascii()
    assert len(name) <= MAX_LENGTH + 9


def test_names_that_had_to_be_changed_stay_apart() -> None:
    assert run_name("a", ["data.source=x/y"]) != run_name("a", ["data.source=x_y"])
    assert run_name("a", ["x" * 200]) != run_name("a", ["x" * 201])


@given(st.text(st.characters(exclude_characters="${}", exclude_categories=["C"])))
def test_a_quoted_value_is_taken_literally(value: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (override,) = OverridesParser.create().parse_overrides([f"key={quote(value)}"])
    assert override.value() == value
