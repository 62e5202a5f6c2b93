"""submit, status, cancel and requeue on a real API server, with the controllers' part played by the tests."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client, config

from tests.k8s.conftest import Cli, Kubectl
from titans_launch.schedulers.kubernetes.api import JOBSET, RAYJOB, TRAINJOB

pytestmark = pytest.mark.k8s

NODES = ("cluster.nodes=2", "parallel=single", "parallel.data=2", "training.micro_batch_size=4")
MERGE = "application/merge-patch+json"
BACKENDS = ("jobset", "trainjob")


def job(name: str, *more: str, backend: str = "jobset") -> list[str]:
    return ["submit", f"name={name}", "cluster=k8s", f"cluster.backend={backend}", *NODES, *more]


def found(kubectl: Kubectl, kind: str, name: str) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(kubectl("get", kind, name, "-o", "json"))
    return made


def is_there(kubectl: Kubectl, kind: str, name: str) -> bool:
    return kubectl("get", kind, name, "--ignore-not-found", "-o", "name") != ""


def holds(whole: Any, part: Any) -> bool:
    """Whether all of `part` is in `whole`, to which a server has added its defaults."""
    if isinstance(part, dict):
        return all(key in whole and holds(whole[key], value) for key, value in part.items())
    if isinstance(part, list):
        return len(part) == len(whole) and all(map(holds, whole, part))
    return bool(whole == part)


Report = Callable[..., None]


@pytest.fixture
def report(kubectl: Kubectl) -> Report:
    """report("jobset", "mine", "Failed", restarts=2): the controller writes down how the object is."""

    def write(kind: str, name: str, condition: str | None, **status: Any) -> None:
        now = {"lastTransitionTime": "2026-01-01T00:00:00Z", "reason": "Told", "message": f"{condition} by the test"}
        status["conditions"] = [{**now, "type": condition, "status": "True"}] if condition else []
        kubectl(
            *("patch", kind, name, "--subresource=status", "--type=merge", "-p", json.dumps({"status": status})),
        )

    return write


@pytest.fixture
def collector(kubeconfig: Path) -> Iterator[list[str]]:
    """The garbage collector: what is to be deleted goes when its pods have gone, here at once. Whom it let go."""
    api = client.CustomObjectsApi(config.new_client_from_config(str(kubeconfig)))
    gone: list[str] = []
    ended = threading.Event()

    def collect() -> None:
        while not ended.wait(0.1):
            for kind in (JOBSET, TRAINJOB, RAYJOB):
                place = (kind.group, kind.version, "titans-dist", kind.plural)
                for each in api.list_namespaced_custom_object(*place)["items"]:
                    if "foregroundDeletion" in each["metadata"].get("finalizers", []):
                        gone.append(each["metadata"]["name"])
                        free = {"metadata": {"finalizers": None}}
                        api.patch_namespaced_custom_object(*place, gone[-1], free, _content_type=MERGE)

    thread = threading.Thread(target=collect)
    thread.start()
    yield gone
    ended.set()
    thread.join()


@pytest.fixture
def platform(kubectl: Kubectl) -> None:
    """What those who run a cluster have made."""
    runtime = (Path(__file__).parents[2] / "k8s" / "trainer" / "runtime.yaml").read_text()
    kubectl("apply", "--server-side", "-f", "-", stdin=runtime)
    queue = {
        "apiVersion": "kueue.x-k8s.io/v1beta2",
        "kind": "LocalQueue",
        "metadata": {"name": "team", "namespace": "titans-dist"},
        "spec": {"clusterQueue": "gpus"},
    }
    kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump(queue))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_job_is_submitted_looked_at_requeued_and_canceled(
    there: Cli, kubectl: Kubectl, report: Report, collector: list[str], platform: None, backend: str
) -> None:
    name = f"whole-{backend}"
    submitted = there(*job(name, backend=backend))
    assert submitted.code == 0, submitted.error
    assert f"submitted runs/{name} to {backend} as {name}" in submitted.out
    first = found(kubectl, backend, name)
    handed_in = yaml.safe_load(Path(f"runs/{name}/submit/{backend}.yaml").read_text())
    assert holds(first["spec"], handed_in["spec"])
    assert "PENDING" in there("status", name).out

    jobs = [{"name": "x", "ready": 1, "active": 1, "failed": 0, "succeeded": 0, "suspended": 0}]
    if backend == "jobset":
        report(backend, name, None, replicatedJobsStatus=jobs, restarts=2, restartsCountTowardsMax=1)
        status = there("status", name).out
        assert "RUNNING" in status and "restarted 2 times, 1 of 100 counts" in status
    else:
        report(backend, name, None, jobsStatus=jobs)
        assert "RUNNING" in there("status", name).out

    again = there(*job(name, backend=backend))
    assert (again.code, f"{name} is running already as {name} of {backend}" in again.error) == (2, True)

    requeued = there("requeue", name)
    assert requeued.code == 0, requeued.error
    second = found(kubectl, backend, name)
    assert second["metadata"]["uid"] != first["metadata"]["uid"] and second["spec"] == first["spec"]
    assert collector == [name]  # it was gone, pods and all, before the next one was made

    canceled = there("cancel", name)
    assert canceled.code == 0, canceled.error
    assert not is_there(kubectl, backend, name) and collector == [name, name]
    gone = there("cancel", name)
    assert (gone.code, gone.error) == (1, f"titans-dist: {name} does not run any more, so there is nothing to cancel\n")


def test_a_job_that_has_ended_makes_room_for_the_next_start_of_its_run(
    there: Cli, kubectl: Kubectl, report: Report, collector: list[str]
) -> None:
    assert there(*job("ended")).code == 0
    report("jobset", "ended", "Failed")
    assert "FAILED" in there("status", "ended").out and "Failed by the test" in there("status", "ended").out
    assert there("cancel", "ended").code == 1
    assert there(*job("ended")).code == 0
    assert "PENDING" in there("status", "ended").out and collector == ["ended"]
    assert there("cancel", "ended").code == 0


def test_an_evaluation_on_ray_is_a_rayjob(there: Cli, kubectl: Kubectl, collector: list[str]) -> None:
    submitted = there(*job("measured", "--command", "evaluate", "suite=offline"))
    assert submitted.code == 0, submitted.error
    first = found(kubectl, "rayjob", "measured")
    handed_in = yaml.safe_load(Path("runs/measured/submit/rayjob.yaml").read_text())
    assert holds(first["spec"], handed_in["spec"])
    assert "titans-dist evaluate" in first["spec"]["entrypoint"] and "suite=offline" in first["spec"]["entrypoint"]
    assert first["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 2
    assert "PENDING" in there("status", "measured").out
    for deployment, outcome, word in (
        ("Running", "RUNNING", "RUNNING"),
        ("Complete", "FAILED", "FAILED"),
        ("Complete", "SUCCEEDED", "COMPLETED"),
    ):
        status = {"status": {"jobDeploymentStatus": deployment, "jobStatus": outcome, "message": "told by the test"}}
        kubectl("patch", "rayjob", "measured", "--subresource=status", "--type=merge", "-p", json.dumps(status))
        said = there("status", "measured").out
        assert word in said and "told by the test" in said
    logs = there("logs", "measured")
    assert (logs.code, "head of its Ray cluster" in logs.error) == (1, True)
    again = there(*job("measured", "--command", "evaluate", "suite=offline"))
    assert again.code == 0, again.error
    assert there("cancel", "measured").code == 0
    assert collector == ["measured", "measured"] and not is_there(kubectl, "rayjob", "measured")


def test_an_object_of_another_run_is_left_alone(there: Cli, kubectl: Kubectl, collector: list[str]) -> None:
    assert there(*job("theirs")).code == 0
    kubectl("annotate", "jobset", "theirs", "--overwrite", "titans-dist/run=Theirs")
    Path("runs/theirs/submit/submission.json").unlink()
    refused = there(*job("theirs"))
    assert (refused.code, "belongs to run Theirs; give this run another name=" in refused.error) == (2, True)
    kubectl("annotate", "jobset", "theirs", "titans-dist/run-")
    assert "belongs to something else" in there(*job("theirs")).error
    kubectl("delete", "jobset", "theirs")


def test_a_queue_of_kueue_holds_the_job_until_there_is_room(
    there: Cli, kubectl: Kubectl, platform: None, collector: list[str]
) -> None:
    assert there(*job("queued", "cluster.queue=team")).code == 0
    made = found(kubectl, "jobset", "queued")
    assert made["spec"]["suspend"] is True and made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert "SUSPENDED waits for its queue" in there("status", "queued").out
    assert there("cancel", "queued").code == 0


BAD = [
    (["cluster.queue=nobody"], 2, "namespace titans-dist has no LocalQueue nobody"),
    (["cluster.backend=trainjob", "cluster.kubernetes.runtime=other"], 2, "has no ClusterTrainingRuntime other"),
    (["cluster.kubernetes.context=elsewhere"], 2, "no Kubernetes cluster is configured (Invalid kube-config file"),
    (["+cluster.kubernetes.resources.gpus=many"], 2, "refuses to make JobSet bad: "),
    (["cluster.nodes=3"], 2, "2 processes of the layout cannot be shared evenly by cluster.nodes=3"),
    (["cluster.image=null"], 2, "needs an image"),
    (["cluster.image=titans-dist:latest"], 2, "use a tag other than latest"),
]


@pytest.mark.parametrize(("overrides", "code", "sentence"), BAD, ids=[case[2] for case in BAD])
def test_what_cannot_be_is_refused_in_one_sentence_and_nothing_is_made(
    there: Cli, kubectl: Kubectl, platform: None, overrides: list[str], code: int, sentence: str
) -> None:
    answer = there(*job("bad", *overrides))
    assert (answer.code, answer.error.count("\n"), answer.out) == (code, 1, "")
    assert sentence in answer.error
    assert not is_there(kubectl, "jobset", "bad") and not is_there(kubectl, "trainjob", "bad")
    assert not Path("runs/bad/submit/submission.json").exists()


def test_a_field_that_the_server_does_not_know_is_refused_and_not_dropped(
    there: Cli, kubectl: Kubectl, monkeypatch: pytest.MonkeyPatch
) -> None:
    from titans_launch.schedulers.kubernetes import jobset

    monkeypatch.setattr(jobset, "network", lambda name: {"subdomain": name, "enableDNSHostname": True})
    answer = there(*job("misspelt"))
    assert (answer.code, 'unknown field "spec.network.enableDNSHostname"' in answer.error) == (2, True)
    assert not is_there(kubectl, "jobset", "misspelt")


def test_a_server_that_cannot_be_reached_and_no_server_at_all_are_said_in_one_sentence(
    here: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = here(*job("nowhere"))
    assert (answer.code, answer.error.count("\n"), "set KUBECONFIG" in answer.error) == (2, 1, True)
    config = {
        "clusters": [{"name": "a", "cluster": {"server": "http://127.0.0.1:1"}}],
        "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}],
        "users": [{"name": "a", "user": {}}],
        "current-context": "a",
    }
    (tmp_path / "none").write_text(yaml.safe_dump(config))
    started = time.monotonic()
    answer = here(*job("nowhere"))
    assert (answer.code, answer.error.count("\n")) == (1, 1)
    assert "the Kubernetes server http://127.0.0.1:1 cannot be reached" in answer.error
    assert time.monotonic() - started < 60  # it is not tried for ever
    assert not Path("runs/nowhere/submit/submission.json").exists()
