"""A job as a JobSet: all nodes are one indexed Job, and JobSet starts them again together.

What a failure means is decided twice. The Job fails at once when a pod does, and its message tells which rule of the
pod failure policy matched; the JobSet then restarts all pods, free of charge or not, or gives up.
"""

from __future__ import annotations

from titans_dist.config import Config
from titans_dist.config.errors import CheckpointError, ConfigError, HealthError
from titans_dist.config.machines import seconds
from titans_launch.schedulers.job import Job
from titans_launch.schedulers.kubernetes import pods
from titans_launch.schedulers.kubernetes.manifest import Object, is_queued, metadata

VERSION = "jobset.x-k8s.io/v1alpha2"
WORKERS = "workers"
CONTAINER = "train"
FINAL_CODES = sorted({error.exit_code for error in (ConfigError, CheckpointError, HealthError)})
"""Exit codes after which a new start would end in the same way."""
_FINAL, _DISRUPTED = 0, 1
"""Where the rules are in the pod failure policy."""


def render(job: Job) -> Object:
    """The JobSet of a job."""
    first_host = f"{job.name}-{WORKERS}-0-0.{job.name}"
    variables = [*pods.environment(job), *pods.attempt(job), *pods.rendezvous(job, first_host)]
    return {
        "apiVersion": VERSION,
        "kind": "JobSet",
        "metadata": metadata(job),
        "spec": {
            "suspend": is_queued(job),
            "ttlSecondsAfterFinished": round(job.config.cluster.kubernetes.keep_hours * 3600),
            "network": network(job.name),
            "successPolicy": {"operator": "All"},
            "failurePolicy": failure_policy(job.config),
            "replicatedJobs": [
                {
                    "name": WORKERS,
                    "replicas": 1,
                    "template": {
                        "spec": {
                            "parallelism": job.nodes,
                            "completions": job.nodes,
                            **indexed(CONTAINER),
                            **_deadline(job.config),
                            "template": pods.template(job, pods.container(job, CONTAINER, variables)),
                        }
                    },
                }
            ],
        },
    }


def network(subdomain: str) -> Object:
    """Names for the pods: node 0 must be found before it is ready, since it is ready only with the others."""
    return {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": subdomain}


def failure_policy(config: Config) -> Object:
    """What becomes of the JobSet when its Job has failed. Whatever no rule is for is a restart that counts.

    A blocking restart lets the pods of the last attempt save before those of the next one look for a checkpoint.
    """
    rules = [("final", "FailJobSet", _FINAL), ("disrupted", "RestartJobSetAndIgnoreMaxRestarts", _DISRUPTED)]
    return {
        "maxRestarts": config.cluster.max_requeues,
        "restartStrategy": "BlockingRecreate",
        "rules": [
            {
                "name": name,
                "action": action,
                "onJobFailureReasons": ["PodFailurePolicy"],
                "onJobFailureMessagePatterns": [f"matching FailJob rule at index {index}$"],
            }
            for name, action, index in rules
        ],
    }


def indexed(container: str) -> Object:
    """The Job of the nodes: each pod has a number, and one that fails fails the Job."""
    final = {"containerName": container, "operator": "In", "values": FINAL_CODES}
    disrupted = {"type": "DisruptionTarget", "status": "True"}
    return {
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": final},
                {"action": "FailJob", "onPodConditions": [disrupted]},
            ]
        },
    }


def _deadline(config: Config) -> Object:
    """At its end the pods get SIGTERM, and `grace_s` seconds of their time for the save."""
    cluster = config.cluster
    return {} if cluster.time is None else {"activeDeadlineSeconds": seconds(cluster.time) - cluster.grace_s}
