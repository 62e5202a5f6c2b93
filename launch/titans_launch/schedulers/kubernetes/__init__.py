"""Kubernetes: a JobSet or a Kubeflow TrainJob for each job, made, looked at and deleted through the official client."""

from __future__ import annotations

from titans_launch.schedulers.kubernetes.backend import Kubernetes


def scheduler(backend: str) -> Kubernetes:
    """That of backend jobset or trainjob."""
    return Kubernetes(backend)
