"""Everything in k8s/ and everything that is rendered is accepted by servers, and says what it should."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.k8s.conftest import Kubectl
from tests.k8s.manifests import BASE, COMMITTED, GPU, K8S, RDMA, rendered
from tests.k8s.objects import FOLDERS, SOURCES, Object, objects, only, pods, templates
from titans_dist.config import Config
from titans_launch.local import GRACE_S, STACKS_S
from titans_launch.schedulers.kubernetes import jobset

CORE = ("v1", "networking.k8s.io/v1")
KUBERNETES = "1.37.0"


@pytest.mark.parametrize("name", COMMITTED)
def test_what_is_committed_is_what_is_rendered(name: str) -> None:
    assert yaml.safe_load((K8S / name).read_text()) == COMMITTED[name](), (
        "python -m tests.k8s.manifests writes it again"
    )


def test_the_overlays_for_gpus_make_what_submit_renders() -> None:
    assert only("overlays/gpu", "JobSet") == rendered(GPU)
    made, wanted = copy.deepcopy(only("overlays/gpu-rdma", "JobSet")), rendered(f"{GPU} {RDMA}")
    for each in (made, wanted):
        (container,) = templates(each)[0]["spec"]["containers"]
        del container["command"]  # that of the second has the overrides which the overlay stands for
    assert made == wanted


@pytest.mark.k8s
@pytest.mark.parametrize("source", [source for source in SOURCES if source != "setup"])
def test_the_server_accepts_every_object_and_every_field_of_it(kubectl: Kubectl, source: str) -> None:
    custom = [each for each in objects(source) if each["apiVersion"] not in CORE]
    assert custom
    for each in custom:
        each = copy.deepcopy(each)
        each["metadata"]["name"] = f"dry-{each['metadata']['name']}"
        kubectl("create", "--dry-run=server", "--validate=strict", "-f", "-", stdin=json.dumps(each))


@pytest.mark.parametrize("source", SOURCES)
def test_core_objects_and_every_pod_in_custom_ones_obey_the_schemas_of_kubernetes(source: str) -> None:
    core = [each for each in objects(source) if each["apiVersion"] in CORE] + pods(source)
    assert core or source == "trainer"  # the pod of a runtime has no command yet
    for each in core:
        kubernetes_validate.validate(each, KUBERNETES, strict=True)


def test_the_versions_are_those_that_are_used() -> None:
    versions = yaml.safe_load((K8S / "versions.yaml").read_text())
    used = {each["apiVersion"] for source in SOURCES for each in objects(source)}
    assert set(versions) == used - set(CORE)


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder.startswith(("base", "overlays"))])
def test_every_reference_finds_its_object(folder: str) -> None:
    there = {(each["kind"], each["metadata"]["name"]) for each in objects(folder)}
    namespaces = {
        each["metadata"].get("namespace") for each in objects(folder) if each["kind"] in ("JobSet", "LocalQueue")
    }
    assert namespaces == {only(folder, "Namespace")["metadata"]["name"]}
    made = only(folder, "JobSet")
    (pod,) = templates(made)
    wanted = {("ServiceAccount", pod["spec"]["serviceAccountName"])}
    wanted |= {
        ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
        for volume in pod["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    }
    claim = only(folder, "PersistentVolumeClaim")["spec"]
    assert claim["accessModes"] == ["ReadWriteMany"]
    wanted |= {("PersistentVolume", claim["volumeName"])} if "volumeName" in claim else set()
    queue = made["metadata"]["labels"].get("kueue.x-k8s.io/queue-name")
    wanted |= {("LocalQueue", queue)} if queue else set()
    assert wanted <= there
    (container,) = pod["spec"]["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["spec"]["volumes"]
    }
    (policy,) = (each["spec"] for each in objects(folder) if each["kind"] == "NetworkPolicy")
    selected = policy["podSelector"]["matchLabels"].items()
    assert selected <= pod["metadata"]["labels"].items()
    assert policy["ingress"] == [{"from": [{"podSelector": policy["podSelector"]}]}]


def variables(pod: Object) -> dict[str, Any]:
    (container,) = pod["spec"]["containers"]
    return {each["name"]: each.get("value") or each["valueFrom"]["fieldRef"]["fieldPath"] for each in container["env"]}


def test_the_pods_of_a_jobset_find_their_first_one_by_the_name_that_the_controller_gives_it() -> None:
    made = only("overlays/gpu", "JobSet")
    (job,) = made["spec"]["replicatedJobs"]
    # JobSet: <name>-<replicated job>-<job index>-<pod index>.<subdomain>, a label of at most 63 characters.
    host = f"{made['metadata']['name']}-{job['name']}-0-0"
    found = variables(templates(made)[0])
    assert found["PET_MASTER_ADDR"] == f"{host}.{made['spec']['network']['subdomain']}"
    assert made["spec"]["network"]["publishNotReadyAddresses"] and made["spec"]["network"]["enableDNSHostnames"]
    spec = job["template"]["spec"]
    assert found["PET_NNODES"] == str(spec["parallelism"]) == str(spec["completions"]) == "4"
    assert spec["completionMode"] == "Indexed"
    assert found["PET_NODE_RANK"] == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    # Kubernetes replaces only what stands further up in the list.
    assert found["PET_RDZV_ID"] == "titans-$(JOBSET_RESTART_ATTEMPT)"
    assert list(found).index("JOBSET_RESTART_ATTEMPT") < list(found).index("PET_RDZV_ID")
    assert found["JOBSET_RESTART_ATTEMPT"] == "metadata.annotations['jobset.sigs.k8s.io/restart-attempt']"


def test_names_of_pods_fit_into_a_label_however_long_that_of_the_run_is() -> None:
    made = rendered(f"{BASE} name={'a-very-long-name-of-a-run' * 4}")
    assert len(f"{made['metadata']['name']}-{jobset.WORKERS}-0-9999-abcde") <= 63


def test_a_trainjob_leaves_the_rendezvous_to_trainer_which_refuses_it_from_others() -> None:
    made = only("trainjob-rdma", "TrainJob")
    names = {each["name"] for each in made["spec"]["trainer"]["env"]}
    assert {name for name in names if name.startswith("PET_")} == {"PET_RDZV_ID"}
    assert (made["spec"]["trainer"]["numNodes"], made["spec"]["trainer"]["numProcPerNode"]) == (4, 8)


def test_one_node_alone_meets_nobody() -> None:
    made = rendered("submit name=one cluster=k8s")
    assert not [name for name in variables(templates(made)[0]) if name.startswith("PET_")]


@pytest.mark.parametrize("source", ["base", "overlays/gpu-rdma", "trainjob", "trainjob-rdma"])
def test_pods_get_longer_to_end_than_everything_that_must_happen_in_that_time(source: str) -> None:
    """SIGTERM; a save of up to grace_s, in which torchrun has patience for timeout_s; the launcher's tidying up."""
    cluster = Config().cluster
    for pod in pods(source):
        grace_s = pod["spec"]["terminationGracePeriodSeconds"]
        assert grace_s > cluster.timeout_s + GRACE_S / 2 + STACKS_S  # TORCH_ELASTIC_SHUTDOWN_TIMEOUT is timeout_s
        assert grace_s > cluster.grace_s + GRACE_S + STACKS_S


def test_a_time_limit_leaves_the_grace_for_the_save() -> None:
    made = rendered(f"{BASE} cluster.time=01:00:00 cluster.grace_s=120")
    (job,) = made["spec"]["replicatedJobs"]
    assert job["template"]["spec"]["activeDeadlineSeconds"] == 3600 - 120


def test_words_of_the_user_are_never_replaced_by_kubernetes() -> None:
    of_user = """'+cluster.environment={NOTE: "$(HOME) $$"}' "data.path='$(HOME)'" """
    made = rendered(f"{BASE} {of_user}")
    (container,) = templates(made)[0]["spec"]["containers"]
    assert variables(templates(made)[0])["NOTE"] == "$$(HOME) $$$$"
    assert any("$$(HOME)" in word for word in container["command"])


def test_a_run_folder_on_the_claim_is_the_pods_own_and_has_the_code_they_run(tmp_path: Path) -> None:
    """Where this machine mounts the claim at the same place as the pods do."""
    made = rendered(f"{BASE} cluster.kubernetes.mount={{folder}}")
    (container,) = templates(made)[0]["spec"]["containers"]
    folder = container["workingDir"]
    assert container["command"][-1] == f"hydra.run.dir='{folder}/runs/titans'"
    assert f"{folder}/runs/titans/submit/code" in variables(templates(made)[0])["PYTHONPATH"].split(":")
