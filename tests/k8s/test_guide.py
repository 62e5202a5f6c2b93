"""Every command of k8s/README.md that needs no more than an API server is run on one, in the guide's order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from tests.k8s.conftest import Cli, Kubectl
from tests.k8s.manifests import K8S
from tests.k8s.test_commands import collector  # noqa: F401, as the part of the controllers
from titans_dist.config import Config
from titans_launch.schedulers.kubernetes import jobset, pods

GUIDE = (K8S / "README.md").read_text()


def blocks(language: str) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)
    return [line for block in found for line in block.splitlines()]


@pytest.mark.k8s
@pytest.mark.usefixtures("collector")
def test_the_commands_of_the_guide_work_one_after_the_other(there: Cli, kubectl: Kubectl) -> None:
    assert len(blocks("sh")) >= 12
    Path("k8s").symlink_to(K8S)
    for line in blocks("sh"):
        program, *arguments = shlex.split(line)
        if program == "kubectl":
            assert kubectl(*arguments)
        else:
            assert program == "titans-dist"
            answer = there(*arguments)
            assert (answer.code, answer.error) == (0, ""), line


def test_commands_that_need_a_cluster_name_files_and_keys_that_there_are() -> None:
    lines = blocks("console")
    assert all(line.startswith("$ ") for line in lines)
    for path in re.findall(r"k8s/[\w/.-]+", GUIDE):
        assert (K8S.parent / path.rstrip(".")).exists(), path
    folders = re.findall(r"`((?:overlays|components|setup|base|trainer|ray)[\w/-]*/)`", GUIDE)
    assert len(set(folders)) >= 8 and all((K8S / folder / "kustomization.yaml").exists() for folder in folders)


def test_the_keys_it_names_exist() -> None:
    keys = set(re.findall(r"\b((?:cluster|checkpoint)\.[a-z_]+(?:\.[a-z_]+)?)", GUIDE)) - {"cluster.local"}
    assert len(keys) > 15
    for key in keys:
        assert OmegaConf.select(OmegaConf.structured(Config), key, throw_on_missing=False, default="no") != "no", key


def test_the_tables_say_what_is() -> None:
    cluster = Config().cluster
    assert f"| `cluster.grace_s` | {cluster.grace_s} s |" in GUIDE
    assert f"| {cluster.timeout_s} s | `cluster.timeout_s` |" in GUIDE
    assert f"| `terminationGracePeriodSeconds` | {pods.grace_s(Config())} s |" in GUIDE
    assert f"wrong | {', '.join(map(str, jobset.FINAL_CODES))} | fails at once" in GUIDE
    for version in yaml.safe_load((K8S / "versions.yaml").read_text()).values():
        assert f"| {version.split()[-1]} |" in GUIDE
