"""The Dockerfile: by a linter, by what it copies, and by the package that its build context makes."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.k8s.conftest import BIN

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
CONFIGS = [*(ROOT / "configs").glob("cluster/k8s*.yaml")]


def in_context(name: str) -> bool:
    """Whether Docker sees a file or folder at the top: the last pattern that fits decides."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    fits = [line for line in lines if fnmatch.fnmatch(name, line.removeprefix("!"))]
    return bool(fits) and fits[-1].startswith("!")


def stages() -> dict[str, str]:
    """Each stage's own lines."""
    parts = re.split(r"^FROM (.+) AS (\S+)$", DOCKERFILE, flags=re.MULTILINE)
    return {name: body for name, body in zip(parts[2::3], parts[3::3], strict=True)}


def test_a_linter_finds_nothing() -> None:
    done = subprocess.run([BIN / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "")


def test_everything_that_is_copied_and_installed_is_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installed = re.findall(r'"\.\[(\w+)\]"', DOCKERFILE)
    assert installed and set(installed) <= set(extras)
    for source in re.findall(r"^COPY (\S+) \S+$", DOCKERFILE, re.MULTILINE):
        assert source == "." or (in_context(source) and (ROOT / source).exists()), source
    for stage in re.findall(r"--from=(\S+)", DOCKERFILE):
        assert stage in stages()
    assert re.findall(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE) == ["torch=="]


def test_what_is_installed_is_pinned() -> None:
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert {base for base in bases if base not in stages()} == {"python:3.11.13-slim-bookworm"}
    commands = re.findall(r"pip install (?:.*\\\n)*.*", DOCKERFILE)
    assert len(commands) == 5 and all("-c constraints.txt" in each for each in commands)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_images_run_as_nobody_in_particular(target: str) -> None:
    assert re.findall(r"^USER (.+)$", stages()[target], re.MULTILINE) == ["10001:10001"]


def test_the_default_target_is_that_of_the_configuration_for_gpus() -> None:
    assert list(stages())[-1] == "cuda"
    images = {path.stem: yaml.safe_load(path.read_text())["image"] for path in CONFIGS}
    assert images == {"k8s": "titans-dist:0.1.0-cpu", "k8s_h100": "titans-dist:0.1.0"}


def test_the_build_context_alone_makes_the_whole_package(tmp_path: Path) -> None:
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    context = tmp_path / "context"
    for name in names:
        if in_context(name.partition("/")[0]) and (ROOT / name).exists():
            (context / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, context / name, follow_symlinks=False)
    assert not (context / "tests").exists() and not (context / ".git").exists()
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*pip, "--wheel-dir", tmp_path, context], check=True, capture_output=True, timeout=200)
    (wheel,) = tmp_path.glob("*.whl")
    packed = zipfile.ZipFile(wheel).namelist()
    assert {"titans_dist/configs/cluster/k8s_h100.yaml", "titans_launch/schedulers/kubernetes/pods.py"} <= set(packed)
