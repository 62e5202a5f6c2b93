"""No pod of ours may do more than it must, by a linter's rules and by our own."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.k8s.objects import FOLDERS, SOURCES, objects, pods

EXCEPTIONS = {
    "CKV_K8S_8": "liveness: a hang is found by the timeout of collectives, and a kill would hide its cause",
    "CKV_K8S_9": "readiness: nobody sends requests to a training job",
    "CKV_K8S_15": "pulling always: a thousand pods that start again would all ask for an image of a fixed tag",
    "CKV_K8S_43": "digests: those of the user's own images cannot be known here; tags other than latest are demanded",
}
WITH_RDMA = {"CKV_K8S_25": "capabilities: RDMA locks memory", "CKV_K8S_37": "the same"}
CARELESS = "careless.yaml"
"""A pod without limits, to see that the linter would say so."""


def checkov() -> str | None:
    """The linter, which `make` puts into an environment of its own."""
    own = Path(sys.prefix) / "checkov" / "bin" / "checkov"
    return str(own) if own.exists() else shutil.which("checkov")


def test_a_linter_finds_nothing_in_pods_but_what_is_meant(tmp_path: Path) -> None:
    program = checkov()
    if program is None:
        pytest.skip("no checkov: `make .venv/checkov/.installed` installs it")
    for source in SOURCES:
        core = [each for each in objects(source) if source in FOLDERS and each["apiVersion"] == "networking.k8s.io/v1"]
        if not core:  # those of other sources are beside the base
            core = [each for each in objects("base") if each["kind"] == "NetworkPolicy"]
        folder = tmp_path / source.replace("/", "-")
        folder.mkdir()
        (folder / "all.yaml").write_text(yaml.safe_dump_all([*pods(source), *core]))
    (careless,) = copy.deepcopy(pods("base"))
    careless["spec"]["containers"][0].pop("resources")
    (tmp_path / CARELESS).write_text(yaml.safe_dump(careless))
    done = subprocess.run(
        [program, "--directory", str(tmp_path), "--framework", "kubernetes", "--output", "json", "--skip-download"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    results = json.loads(done.stdout)["results"]
    assert len(results["passed_checks"]) > 70 * len(SOURCES)  # it has looked at each
    found = {
        (each["check_id"], each["check_name"], each["file_path"])
        for each in results["failed_checks"]
        if each["check_id"] not in {**EXCEPTIONS, **(WITH_RDMA if "rdma" in each["file_path"] else {})}
    }
    assert {path for _, _, path in found} == {f"/{CARELESS}"}, found


@pytest.mark.parametrize("source", [source for source in SOURCES if source != "trainer"])
def test_pods_are_restricted(source: str) -> None:
    """The "restricted" level of the pod security standards, and what that leaves open."""
    for pod in pods(source):
        spec = pod["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert spec["automountServiceAccountToken"] is False
        own = spec["securityContext"]
        assert own["runAsNonRoot"] and own["runAsUser"] >= 10000 and own["seccompProfile"] == {"type": "RuntimeDefault"}
        assert all({"persistentVolumeClaim", "emptyDir"} & set(volume) for volume in spec["volumes"])
        for container in spec["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] and security["runAsNonRoot"]
            assert security["allowPrivilegeEscalation"] is False and "privileged" not in security
            more = ["IPC_LOCK"] if "rdma" in source else []
            assert security["capabilities"] == {"drop": ["ALL"], **({"add": more} if more else {})}
            image, _, tag = container["image"].rpartition(":")
            assert image and tag not in ("", "latest")
            amounts = container["resources"]
            assert amounts["limits"] == amounts["requests"] and {"cpu", "memory"} <= set(amounts["limits"])
            # Everything that libraries write without being asked goes to a place that can be written.
            written = [each["value"] for each in container["env"] if each["name"].endswith(("HOME", "_DIR"))]
            assert len(written) == 4 and all(path.startswith("/tmp/") for path in written)
            assert not [each for each in container["env"] if "secretKeyRef" in each.get("valueFrom", {})]


def test_secrets_and_the_pull_secret_are_named_and_nothing_of_them_is_in_the_manifest() -> None:
    from tests.k8s.manifests import BASE, rendered

    more = "cluster.kubernetes.secrets=[wandb] cluster.kubernetes.pull_secret=registry"
    made = rendered(f"{BASE} {more}")
    (job,) = made["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]["template"]["spec"]
    assert spec["containers"][0]["envFrom"] == [{"secretRef": {"name": "wandb"}}]
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
