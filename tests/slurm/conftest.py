"""A Slurm cluster of two nodes that lives as long as the tests of this folder."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster_of_two import Cluster

NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")


@pytest.fixture(scope="session")
def session_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster itself; use `cluster`."""
    if os.geteuid() != 0:
        pytest.skip("a Slurm cluster of one's own needs root")
    there = os.environ["PATH"] + os.pathsep + "/usr/sbin"
    if not all(shutil.which(name, path=there) for name in NEEDED) and shutil.which("apt-get") is None:
        pytest.skip("Slurm and munge are not installed, and there is no apt-get to install them with")
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start()
    except subprocess.CalledProcessError as error:
        if "apt-get failed" in error.stderr:
            pytest.skip("Debian's packages of Slurm and munge cannot be installed here")
        pytest.fail(error.stderr)
    yield cluster
    cluster.stop()


@pytest.fixture
def cluster(session_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Two idle nodes, and every command of Slurm in this process asks them."""
    monkeypatch.setenv("SLURM_CONF", session_cluster.conf)
    yield session_cluster
    session_cluster.reset()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's current folder, which all nodes see."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
