"""Evaluation on Ray workers as a RayJob of KubeRay: a Ray cluster that is there for this job alone."""

from __future__ import annotations

import importlib.metadata
import shlex

from packaging.requirements import Requirement

from titans_dist.config.machines import seconds
from titans_launch.schedulers.job import Job
from titans_launch.schedulers.kubernetes import pods
from titans_launch.schedulers.kubernetes.api import RAYJOB
from titans_launch.schedulers.kubernetes.manifest import APP, Object, is_queued, metadata

HEAD_MEMORY = "8Gi"
HEAD_CPUS = "2"


def render(job: Job) -> Object:
    """The RayJob of a job: a head that only directs, and a worker with all GPUs of each node."""
    cluster, settings = job.config.cluster, job.config.cluster.kubernetes
    deadline = {} if cluster.time is None else {"activeDeadlineSeconds": seconds(cluster.time)}
    return {
        "apiVersion": f"{RAYJOB.group}/{RAYJOB.version}",
        "kind": RAYJOB.title,
        "metadata": metadata(job),
        "spec": {
            "suspend": is_queued(job),
            "submissionMode": "HTTPMode",
            "entrypoint": shlex.join(["titans-dist", *job.words(pods.run_dir(job))]),
            "backoffLimit": 0,
            **deadline,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": round(settings.keep_hours * 3600),
            "rayClusterSpec": {
                "rayVersion": ray_version(),
                # Nobody else in the cluster may run anything here; KubeRay makes the token.
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
                    "template": _pod(job, "ray-head", {"cpu": HEAD_CPUS, "memory": HEAD_MEMORY}),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "workers",
                        "replicas": job.nodes,
                        "minReplicas": job.nodes,
                        "maxReplicas": job.nodes,
                        "rayStartParams": {},
                        "template": _pod(job, "ray-worker", pods.resources(job)["limits"]),
                    }
                ],
            },
        },
    }


def state_of(status: Object) -> tuple[str, bool]:
    """How a RayJob is by its status, in the words for all jobs; and whether it is over."""
    deployment = status.get("jobDeploymentStatus", "")
    if deployment in ("Complete", "Failed"):
        return "COMPLETED" if status.get("jobStatus") == "SUCCEEDED" else "FAILED", True
    return {"Running": "RUNNING", "Suspended": "SUSPENDED", "Suspending": "STOPPING"}.get(deployment, "PENDING"), False


def ray_version() -> str:
    """The Ray that this package pins, which the image has."""
    wanted = [Requirement(line) for line in importlib.metadata.requires(APP) or []]
    (ray,) = (each for each in wanted if each.name == "ray")
    (pin,) = ray.specifier
    return pin.version


def _pod(job: Job, name: str, amounts: dict[str, str]) -> Object:
    container = pods.container(job, name, pods.environment(job))
    del container["command"]  # KubeRay starts Ray
    container["resources"] = {"requests": dict(amounts), "limits": dict(amounts)}
    made = pods.template(job, container)
    del made["spec"]["restartPolicy"]  # KubeRay replaces a node that fails
    if name == "ray-head":
        for key in ("nodeSelector", "tolerations"):  # it needs no GPU and should not take the place of one
            made["spec"].pop(key, None)
    return made
