"""A job as a TrainJob of Kubeflow Trainer, which makes a JobSet of it and of a runtime that the cluster offers.

The runtime decides what a failure means and how the pods' token, priority and lifetime are; a TrainJob cannot.
`runtime` is one in which all that is as in our own JobSet.
"""

from __future__ import annotations

from titans_dist.config import ConfigError
from titans_launch.schedulers.job import Job
from titans_launch.schedulers.kubernetes import jobset, pods
from titans_launch.schedulers.kubernetes.manifest import APP, Object, is_queued, metadata

VERSION = "trainer.kubeflow.org/v1alpha1"
NODE = "node"
"""What Trainer calls both the replicated job and the container of the nodes."""


def render(job: Job) -> Object:
    """The TrainJob of a job. Raises ConfigError for what only the runtime can have."""
    cluster, settings = job.config.cluster, job.config.cluster.kubernetes
    for key, value in (
        ("cluster.time", cluster.time),
        ("cluster.kubernetes.secrets", list(settings.secrets) or None),
        ("cluster.kubernetes.priority_class", settings.priority_class),
    ):
        if value is not None:
            raise ConfigError(
                f"{key}={value} is nothing that a TrainJob can ask for; put it into the runtime "
                f"{settings.runtime}, or use cluster.backend=jobset"
            )
    # Trainer refuses those of torchrun's variables that it sets itself.
    identity = [each for each in pods.rendezvous(job, "") if each["name"] == "PET_RDZV_ID"]
    return {
        "apiVersion": VERSION,
        "kind": "TrainJob",
        "metadata": metadata(job),
        "spec": {
            "suspend": is_queued(job),
            "runtimeRef": {
                "apiGroup": VERSION.partition("/")[0],
                "kind": "ClusterTrainingRuntime",
                "name": settings.runtime,
            },
            "trainer": {
                "image": cluster.image,
                "command": pods.command(job),
                "numNodes": job.nodes,
                "numProcPerNode": job.per_node,
                "env": [*pods.environment(job), *pods.attempt(job), *identity],
                "resourcesPerNode": pods.resources(job),
            },
            "runtimePatches": [
                {
                    "manager": f"{APP}/submit",
                    "trainingRuntimeSpec": {
                        "template": {
                            "spec": {"replicatedJobs": [{"name": NODE, "template": {"spec": {"template": _pod(job)}}}]}
                        }
                    },
                }
            ],
        },
    }


def _pod(job: Job) -> Object:
    """What differs from the pod of the runtime."""
    container = {
        "name": NODE,
        "securityContext": pods.container_security(job),
        "volumeMounts": pods.mounts(job),
    }
    made = pods.template(job, container)
    for key in ("restartPolicy", "automountServiceAccountToken", "enableServiceLinks"):
        del made["spec"][key]
    return made


def runtime(job: Job) -> Object:
    """A ClusterTrainingRuntime under which a TrainJob fails and restarts as our JobSet does."""
    cluster = job.config.cluster
    container = {
        "name": NODE,
        "image": cluster.image,
        "workingDir": cluster.kubernetes.mount,
        "securityContext": pods.container_security(job),
    }
    spec = pods.template(job, container)["spec"]
    kept = ("restartPolicy", "terminationGracePeriodSeconds", "automountServiceAccountToken", "enableServiceLinks")
    return {
        "apiVersion": VERSION,
        "kind": "ClusterTrainingRuntime",
        "metadata": {"name": cluster.kubernetes.runtime, "labels": {"trainer.kubeflow.org/framework": "torch"}},
        "spec": {
            "mlPolicy": {"numNodes": 1, "torch": {}},
            "template": {
                "spec": {
                    "ttlSecondsAfterFinished": round(cluster.kubernetes.keep_hours * 3600),
                    "successPolicy": {"operator": "All"},
                    "failurePolicy": jobset.failure_policy(job.config),
                    "replicatedJobs": [
                        {
                            "name": NODE,
                            "replicas": 1,
                            "template": {
                                "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
                                "spec": {
                                    **jobset.indexed(NODE),
                                    "template": {
                                        "spec": {
                                            **{key: spec[key] for key in kept},
                                            "securityContext": pods.security(job),
                                            "containers": [container],
                                        }
                                    },
                                },
                            },
                        }
                    ],
                }
            },
        },
    }
