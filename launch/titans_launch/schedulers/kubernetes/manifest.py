"""What all objects that we make have in common, and their YAML."""

from __future__ import annotations

from typing import Any

import yaml

from titans_launch.schedulers.job import Job

Object = dict[str, Any]

APP = "titans-dist"
QUEUE = "kueue.x-k8s.io/queue-name"
"""Label by which Kueue knows the queue of an object."""
RUN = f"{APP}/run"
"""Annotation with the run's own name, which the object's name was made of."""


class _Dumper(yaml.SafeDumper):
    """Without anchors: each part of a manifest can be read, and edited, by itself."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def dump(title: str, *objects: Object) -> str:
    """The text of a manifest, its keys in the order in which they were made, below a line of comment."""
    texts = [yaml.dump(each, Dumper=_Dumper, sort_keys=False, width=120) for each in objects]
    return f"# {title}\n" + "---\n".join(texts)


def metadata(job: Job) -> Object:
    """Of the object that stands for the job."""
    made: Object = {
        "name": job.name,
        "namespace": job.config.cluster.kubernetes.namespace,
        "labels": labels(job),
        "annotations": {RUN: job.run_dir.name},
    }
    if job.config.cluster.queue is not None:
        made["labels"][QUEUE] = job.config.cluster.queue
    return made


def labels(job: Job) -> dict[str, str]:
    """Of everything that belongs to the job."""
    return {"app.kubernetes.io/name": APP, "app.kubernetes.io/instance": job.name}


def is_queued(job: Job) -> bool:
    """Whether the object begins suspended, because Kueue lets it go on when there is room."""
    return job.config.cluster.queue is not None


def literal(text: str) -> str:
    """`text` for a command or a variable: Kubernetes would replace $(NAME) in it.

    >>> literal("name=$(HOME)")
    'name=$$(HOME)'
    """
    return text.replace("$", "$$")
