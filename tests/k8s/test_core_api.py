"""What is asked of the core kinds, which the tests' API server lacks: of a small server that answers as theirs does."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from tests.k8s.conftest import Cli, use
from tests.k8s.test_commands import job

CORE = "/api/v1/namespaces/titans-dist"
JOBSETS = "/apis/jobset.x-k8s.io/v1alpha2/namespaces/titans-dist/jobsets"
CLAIM = f"{CORE}/persistentvolumeclaims/titans-dist"


class Cluster(ThreadingHTTPServer):
    """Objects by their path, and what was made."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, Any] = {
            "/api/v1": {},
            CORE: {"kind": "Namespace"},
            f"{CORE}/serviceaccounts/titans-dist": {},
            CLAIM: {"spec": {"accessModes": ["ReadWriteMany"]}},
            JOBSETS: {"items": []},
        }
        self.forbidden: set[str] = set()
        self.made: list[tuple[str, dict[str, list[str]]]] = []
        self.asked: list[str] = []
        self.after: dict[str, Callable[[], None]] = {}
        """What happens when a path has been answered for the first time."""

    def add_pod(self, name: str, created: str, log: str, phase: str = "Running") -> None:
        """A pod of node 0."""
        pods = self.objects.setdefault(f"{CORE}/pods", {"items": []})
        metadata = {"name": name, "uid": name, "creationTimestamp": created}
        pods["items"].insert(0, {"metadata": metadata, "status": {"phase": phase}})
        self.objects[f"{CORE}/pods/{name}/log"] = log


class _Handler(BaseHTTPRequestHandler):
    server: Cluster

    def do_GET(self) -> None:
        path = urlsplit(self.path).path.rstrip("/")
        self.server.asked.append(self.path)
        if path in self.server.forbidden:
            self.answer(403, {"message": "you may not"})
        elif path in self.server.objects:
            self.answer(200, self.server.objects[path])
            self.server.after.pop(path, lambda: None)()
        else:
            self.answer(404, {"message": f"{path} not found"})

    def do_POST(self) -> None:
        url = urlsplit(self.path)
        made = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        query = parse_qs(url.query)
        self.server.made.append((made["metadata"]["name"], query))
        if "dryRun" not in query:
            self.server.objects[f"{url.path}/{made['metadata']['name']}"] = made
        self.answer(201, made)

    def answer(self, status: int, content: Any) -> None:
        text = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Cli) -> Iterator[Cluster]:
    with Cluster() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        config = {
            "clusters": [{"name": "a", "cluster": {"server": address}}],
            "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}],
            "users": [{"name": "a", "user": {}}],
            "current-context": "a",
        }
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
        use(monkeypatch, tmp_path / "kubeconfig")
        yield server
        server.shutdown()


def test_a_job_whose_claims_accounts_and_secrets_are_there_is_tried_and_then_made(here: Cli, cluster: Cluster) -> None:
    cluster.objects[f"{CORE}/secrets/wandb"] = {}
    answer = here(*job("full", "cluster.kubernetes.secrets=[wandb]"))
    assert answer.code == 0, answer.error
    assert [(name, "dryRun" in query, query["fieldValidation"]) for name, query in cluster.made] == [
        ("full", True, ["Strict"]),
        ("full", False, ["Strict"]),
    ]


MISSING = [
    (CORE, [], "the cluster has no namespace titans-dist; kubectl create namespace titans-dist makes it"),
    (CLAIM, [], "namespace titans-dist has no PersistentVolumeClaim titans-dist; make it as k8s/README.md says"),
    ("", ["+cluster.kubernetes.claims.corpus=/data"], "namespace titans-dist has no PersistentVolumeClaim corpus"),
    ("", ["cluster.kubernetes.secrets=[wandb]"], "namespace titans-dist has no Secret wandb"),
    ("", ["cluster.kubernetes.pull_secret=registry"], "namespace titans-dist has no Secret registry"),
    ("", ["cluster.kubernetes.service_account=mine"], "namespace titans-dist has no ServiceAccount mine"),
    (JOBSETS, [], "the cluster has no jobsets.jobset.x-k8s.io; JobSet is to be installed, see k8s/README.md"),
    ("", ["cluster.queue=team"], "the cluster has no Kueue, so cluster.queue=team cannot be; leave it unset"),
]


@pytest.mark.parametrize(("path", "overrides", "sentence"), MISSING, ids=[case[2] for case in MISSING])
def test_what_the_pods_would_wait_for_in_vain_is_missed_before_anything_is_made(
    here: Cli, cluster: Cluster, path: str, overrides: list[str], sentence: str
) -> None:
    cluster.objects.pop(path, None)
    answer = here(*job("lacking", *overrides))
    assert (answer.code, answer.error.count("\n"), cluster.made) == (2, 1, [])
    assert sentence in answer.error


def test_a_claim_that_only_one_node_can_mount_is_refused_for_two(here: Cli, cluster: Cluster) -> None:
    cluster.objects[CLAIM] = {"spec": {"accessModes": ["ReadWriteOnce"]}}
    answer = here(*job("narrow"))
    assert (answer.code, "PersistentVolumeClaim titans-dist is ReadWriteOnce" in answer.error) == (2, True)
    assert here("submit", "name=alone", "cluster=k8s").code == 0


def test_who_may_not_look_at_secrets_may_use_them(here: Cli, cluster: Cluster) -> None:
    cluster.forbidden |= {CORE, f"{CORE}/secrets/wandb"}
    assert here(*job("trusting", "cluster.kubernetes.secrets=[wandb]")).code == 0


def test_who_may_not_look_at_pods_is_told_so(here: Cli, cluster: Cluster) -> None:
    cluster.forbidden.add(f"{CORE}/pods")
    assert here(*job("mine")).code == 0
    answer = here("logs", "mine")
    assert (answer.code, answer.error.count("\n"), "refuses to list pods: you may not" in answer.error) == (1, 1, True)


def test_logs_are_those_of_the_newest_pod_of_node_0(here: Cli, cluster: Cluster) -> None:
    assert here(*job("talking")).code == 0
    cluster.objects[f"{CORE}/pods"] = {"items": []}
    answer = here("logs", "talking")
    assert (answer.code, "no pod of talking is there; see titans-dist status talking" in answer.error) == (1, True)
    cluster.add_pod("second", "2026-01-02T00:00:00Z", "step 20\n")
    cluster.add_pod("first", "2026-01-01T00:00:00Z", "step 10\n")
    cluster.add_pod("third", "2026-01-03T00:00:00Z", "", phase="Pending")
    answer = here("logs", "talking")
    assert (answer.code, answer.out) == (0, "step 20\n"), answer.error
    selector = parse_qs(urlsplit(cluster.asked[-2]).query)["labelSelector"]
    assert selector == ["jobset.sigs.k8s.io/jobset-name=talking,batch.kubernetes.io/job-completion-index=0"]
    assert parse_qs(urlsplit(cluster.asked[-1]).query)["container"] == ["train"]


def test_logs_that_are_followed_go_on_with_the_next_attempt_until_the_job_is_over(here: Cli, cluster: Cluster) -> None:
    assert here(*job("going")).code == 0
    cluster.add_pod("first", "2026-01-01T00:00:00Z", "step 10\n")

    def end() -> None:
        cluster.add_pod("second", "2026-01-02T00:00:00Z", "step 20\n")
        condition = {"type": "Completed", "status": "True", "message": "all is done"}
        cluster.objects[f"{JOBSETS}/going"]["status"] = {"conditions": [condition]}

    cluster.after[f"{CORE}/pods/first/log"] = end
    answer = here("logs", "going", "--follow")
    assert (answer.code, answer.out) == (0, "step 10\nstep 20\n"), answer.error
    assert "COMPLETED" in here("status", "going").out


def test_without_the_client_the_dry_run_works_and_everything_else_says_what_to_install(
    here: Cli, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    assert here(*job("bare"), "--dry-run").code == 0
    answer = here(*job("bare"))
    assert (answer.code, answer.error.count("\n")) == (2, 1)
    assert "pip install titans-dist[k8s]" in answer.error
