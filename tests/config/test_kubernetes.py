"""The description of a job for Kubernetes: what no cluster would run is refused in one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from tests.config.test_machines import K8S
from tests.config.test_validation import good, put
from titans_dist.config import ConfigError, validate
from titans_dist.config.kubernetes import size_bytes

HERE = "cluster__kubernetes__"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"cluster__image": "localhost:5000/titans"}, "use a tag other than latest, or a digest"),
        ({"cluster__image": "titans@sha256:12"}, "use a tag other than latest, or a digest"),
        ({"cluster__mounts": ["/data"]}, "cluster.mounts is for containers on Slurm; name claims"),
        ({"cluster__queue": "My queue"}, "cluster.queue=My queue is no name of a Kubernetes object"),
        ({HERE + "namespace": "A"}, "cluster.kubernetes.namespace=A is no name of a Kubernetes object"),
        ({HERE + "claim": ""}, "cluster.kubernetes.claim= is no name"),
        ({HERE + "secrets": ["WANDB_KEY"]}, "cluster.kubernetes.secrets has WANDB_KEY, which is no name"),
        ({HERE + "claims": {"-x": "/x"}}, "cluster.kubernetes.claims has -x, which is no name"),
        ({HERE + "mount": "work"}, "mounts a claim at work; use an absolute path"),
        ({HERE + "mount": "/tmp"}, "mounts a claim at /tmp; use an absolute path other than /, /tmp, /dev/shm"),
        ({HERE + "claims": {"data": "/workspace"}}, "mounts two claims at /workspace; give each a path of its own"),
        ({HERE + "shm": "16G"}, "cluster.kubernetes.shm=16G is no size; use a whole number and Ki, Mi, Gi or Ti"),
        ({HERE + "shm": "64Gi"}, "cluster.kubernetes.shm=64Gi counts against cluster.memory=64G and leaves nothing"),
        ({"cluster__environment": {"PET_NNODES": "2"}}, "PET_NNODES, which the launcher sets itself; leave it out"),
        ({HERE + "tolerations": [{"Key": "x"}]}, "tolerations has Key; use key, operator, value, effect"),
    ],
)
def test_what_no_cluster_would_run_is_refused(changes: dict[str, Any], sentence: str) -> None:
    for backend in ("jobset", "trainjob"):
        with pytest.raises(ConfigError) as refusal:
            validate(put(good(), **{**K8S, "cluster__backend": backend, **changes}))
        assert sentence in str(refusal.value)
        assert "\n" not in str(refusal.value)
    validate(put(good(), **changes | {"cluster__image": None}))  # nobody else minds


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cluster__image": f"localhost:5000/a/b@sha256:{'0' * 64}", "cluster__queue": "team.gpus"},
        {HERE + "claims": {"corpus": "/data"}, HERE + "secrets": ["wandb"], HERE + "shm": "63Gi"},
        {HERE + "tolerations": [{"key": "a", "operator": "Exists"}], "cluster__environment": {"PETS": "1"}},
    ],
)
def test_what_a_cluster_would_run_is_not(changes: dict[str, Any]) -> None:
    validate(put(good(), **K8S, **{key: value for key, value in changes.items() if key not in K8S}))
    validate(put(good(), **{**K8S, **changes}))


def test_units_are_binary() -> None:
    assert [size_bytes("x", text) for text in ("3", "1Ki", "2Gi", "1Ti")] == [3, 1024, 2 * 1024**3, 1024**4]
