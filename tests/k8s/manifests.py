"""The manifests of k8s/ that the renderers write, each with the command it is the output of.

`python -m tests.k8s.manifests` writes those of them that are committed again.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from omegaconf import OmegaConf

from titans_dist.config import Config
from titans_launch import cli
from titans_launch.schedulers.job import Job
from titans_launch.schedulers.kubernetes import trainjob
from titans_launch.schedulers.kubernetes.manifest import dump

Object = dict[str, Any]

K8S = Path(__file__).parents[2] / "k8s"
_NODES = "cluster.nodes=2 parallel=single parallel.data=2 training.micro_batch_size=4"
BASE = f"submit name=titans cluster=k8s {_NODES}"
GPU = "submit name=titans experiment=titans_760m cluster=k8s_h100 parallel.data=32"
RDMA = (
    "cluster.queue=titans-dist cluster.kubernetes.topology=cloud.provider.com/topology-rack "
    "cluster.kubernetes.rdma=true +cluster.kubernetes.resources={rdma/ib:8}"
)
EVALUATION = (
    "submit --command evaluate name=titans experiment=titans_760m suite=ruler evaluation.gpus=1 evaluation.workers=32 "
    "cluster=k8s_h100 parallel.data=32"
)


def dry_run(folder: Path, command: str) -> Path:
    """Run `titans-dist COMMAND --dry-run` in this process; the folder with what would be handed in."""
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch.dict(os.environ, HYDRA_FULL_ERROR="1"),
        mock.patch.object(signal, "signal"),  # main lets SIGTERM end its process
    ):
        assert cli.main([*shlex.split(command), "--dry-run"]) == 0
    (submitted,) = folder.glob("runs/*/submit")
    return submitted


def rendered(command: str) -> Object:
    """The object that `titans-dist COMMAND` would hand in; {folder} in it is the folder in which it is called."""
    with tempfile.TemporaryDirectory() as folder:
        submitted = dry_run(Path(folder), command.replace("{folder}", folder))
        (path,) = (file for file in submitted.glob("*.yaml") if file.name != "config.yaml")
        made: Object = yaml.safe_load(path.read_text())
        return made


def job(command: str) -> Job:
    """The job that `titans-dist COMMAND` describes, for renderers that `submit` does not reach."""
    with tempfile.TemporaryDirectory() as folder:
        submitted = dry_run(Path(folder), command)
        stored = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(submitted / "config.yaml"))
        config = OmegaConf.to_object(stored)
        assert isinstance(config, Config)
        arguments = [word for word in shlex.split(command)[1:] if word != "--command"]
        return Job(
            config=config,
            name=config.name,
            run_dir=Path(config.run_dir),
            folder=Path(folder),
            arguments=[config.submit.command, *(word for word in arguments if word != config.submit.command)],
            nodes=config.cluster.nodes,
            per_node=config.cluster.gpus_per_node,
            code=None,
        )


COMMITTED: dict[str, Callable[[], Object]] = {
    "base/jobset.yaml": lambda: rendered(BASE),
    "trainer/runtime.yaml": lambda: trainjob.runtime(job(BASE)),
    "ray/rayjob.yaml": lambda: rendered(EVALUATION),
}


if __name__ == "__main__":
    for name, make in COMMITTED.items():
        title = f"titans-dist {BASE}" if name.startswith("base") else "written by python -m tests.k8s.manifests"
        (K8S / name).write_text(dump(title, make()))
