"""A real API server for the whole session, and the command line in the process of the tests."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from titans_launch import cli

BIN = Path(sys.executable).parent
"""Where the packages of the tests have put kubectl, etcd and hadolint."""
WITH_BIN = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}

Kubectl = Callable[..., str]


@pytest.fixture(scope="session")
def kubeconfig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of an API server that knows the kinds of k8s/versions.yaml.

    It is that of $TITANS_TEST_KUBECONFIG, or one that the program of $TITANS_TEST_KUBE_API starts and stops.
    """
    if given := os.environ.get("TITANS_TEST_KUBECONFIG"):
        yield Path(given)
        return
    helper = os.environ.get("TITANS_TEST_KUBE_API")
    if helper is None:
        pytest.skip("no Kubernetes API server: set TITANS_TEST_KUBECONFIG, or TITANS_TEST_KUBE_API")
    folder = tmp_path_factory.mktemp("kube")
    subprocess.run([helper, "start", str(folder), str(free_ports(3))], env=WITH_BIN, check=True, capture_output=True)
    try:
        yield folder / "kubeconfig"
    finally:
        subprocess.run([helper, "stop", str(folder)], env=WITH_BIN, check=True)


def free_ports(count: int) -> int:
    """The first of so many consecutive ports that nobody has."""
    while True:
        with contextlib.ExitStack() as held, contextlib.suppress(OSError, OverflowError):
            first = held.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            number: int = first.getsockname()[1]
            for offset in range(1, count):
                held.enter_context(socket.socket()).bind(("127.0.0.1", number + offset))
            return number


@pytest.fixture
def kubectl(kubeconfig: Path) -> Kubectl:
    """kubectl("get", "jobsets") is what that prints."""

    def run(*arguments: str, stdin: str | None = None) -> str:
        command = ["kubectl", f"--kubeconfig={kubeconfig}", "--namespace=titans-dist", *arguments]
        done = subprocess.run(command, env=WITH_BIN, input=stdin, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@dataclass
class Answer:
    """What a command has said."""

    code: int
    out: str
    error: str


Cli = Callable[..., Answer]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """here("status", "mine") runs `titans-dist status mine` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    use(monkeypatch, tmp_path / "none")
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # main lets SIGTERM end its process

    def run(*arguments: str) -> Answer:
        capfd.readouterr()
        code = cli.main(list(arguments))
        return Answer(code, *capfd.readouterr())

    return run


@pytest.fixture
def there(here: Cli, kubeconfig: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The same, with the API server as the cluster."""
    use(monkeypatch, kubeconfig)
    return here


def use(monkeypatch: pytest.MonkeyPatch, kubeconfig: Path) -> None:
    """As $KUBECONFIG, which the client looks at when it is imported."""
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(kubeconfig))
