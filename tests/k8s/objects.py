"""All objects of k8s/ and of the renderers, and the pods in them."""

from __future__ import annotations

import subprocess
from functools import cache
from typing import Any

import yaml

from tests.k8s.conftest import WITH_BIN
from tests.k8s.manifests import BASE, GPU, K8S, RDMA, rendered

Object = dict[str, Any]

FOLDERS = ("setup", "base", "overlays/cpu-kind", "overlays/gpu", "overlays/gpu-rdma", "trainer", "ray")
TRAINJOB = "cluster.backend=trainjob"
RENDERED = {"jobset": GPU, "trainjob": f"{BASE} {TRAINJOB}", "trainjob-rdma": f"{GPU} {RDMA} {TRAINJOB}"}
SOURCES = (*FOLDERS, *RENDERED)


@cache
def objects(source: str) -> list[Object]:
    """What `kubectl kustomize` makes of a folder of k8s/, or what a command renders. They are not to be changed."""
    if source in RENDERED:
        return [rendered(RENDERED[source])]
    done = subprocess.run(
        ["kubectl", "kustomize", str(K8S / source)], env=WITH_BIN, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def only(source: str, kind: str) -> Object:
    (found,) = (each for each in objects(source) if each["kind"] == kind)
    return found


def templates(made: Object) -> list[Object]:
    """The pod templates in an object."""
    spec = made.get("spec", {})
    match made["kind"]:
        case "JobSet":
            return [each["template"]["spec"]["template"] for each in spec["replicatedJobs"]]
        case "RayJob":
            cluster = spec["rayClusterSpec"]
            return [cluster["headGroupSpec"]["template"], *(each["template"] for each in cluster["workerGroupSpecs"])]
        case "TrainJob":
            return [merged(made)]
        case _:
            return []


def merged(made: Object) -> Object:
    """The pod that Trainer makes of a TrainJob and our runtime: patches go by the names in lists of named things."""
    runtime = only("trainer", "ClusterTrainingRuntime")["spec"]["template"]["spec"]["replicatedJobs"][0]
    (patch,) = (each["trainingRuntimeSpec"]["template"]["spec"] for each in made["spec"]["runtimePatches"])
    trainer = made["spec"]["trainer"]
    trained = {"image": trainer["image"], "command": trainer["command"], "env": trainer["env"]}
    pod = _merge(runtime["template"]["spec"]["template"], patch["replicatedJobs"][0]["template"]["spec"]["template"])
    pod["spec"]["containers"][0] |= trained | {"resources": trainer["resourcesPerNode"]}
    return pod


def _merge(base: Any, patch: Any) -> Any:
    if isinstance(base, dict) and isinstance(patch, dict):
        return {key: _merge(base.get(key), patch.get(key)) for key in {**base, **patch}}
    if isinstance(base, list) and isinstance(patch, list) and all("name" in each for each in [*base, *patch]):
        one, two = ({each["name"]: each for each in named} for named in (base, patch))
        return [_merge(one.get(name), two.get(name)) for name in {**one, **two}]
    return base if patch is None else patch


def pods(source: str) -> list[Object]:
    """Each pod template of a source as a Pod of its own."""
    made: list[Object] = []
    for each in objects(source):
        for number, template in enumerate(templates(each)):
            name = f"{source.replace('/', '-')}-{number}"
            metadata = {**template.get("metadata", {}), "name": name, "namespace": "titans-dist"}
            made.append({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]})
    return made
