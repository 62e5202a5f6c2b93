"""Which descriptions of a job Kubernetes could not take, found before it is asked."""

from __future__ import annotations

import re

from titans_dist.config.cluster import ClusterConfig
from titans_dist.config.errors import ConfigError

_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_QUANTITY = re.compile(r"([1-9]\d*)(Ki|Mi|Gi|Ti|)")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_TAG = re.compile(r"[^@]+:[\w.-]+|.+@sha256:[0-9a-f]{64}")
_TOLERATION = ("key", "operator", "value", "effect")
_OWN_PATHS = ("/", "/tmp", "/dev/shm")
_OWN_VARIABLES = ("PET_", "JOBSET_")


def check_kubernetes(cluster: ClusterConfig) -> None:
    """Raise ConfigError for the first thing that no cluster would run, one sentence with the mend."""
    settings = cluster.kubernetes
    _needed(cluster)
    if cluster.mounts:
        raise ConfigError("cluster.mounts is for containers on Slurm; name claims in cluster.kubernetes.claims instead")
    for key in ("namespace", "claim", "service_account", "pull_secret", "priority_class", "runtime"):
        if (name := getattr(settings, key)) is not None:
            _check_name(f"cluster.kubernetes.{key}={name}", name)
    for key, names in (("claims", list(settings.claims)), ("secrets", settings.secrets)):
        for name in names:
            _check_name(f"cluster.kubernetes.{key} has {name}, which", name)
    if cluster.queue is not None:
        _check_name(f"cluster.queue={cluster.queue}", cluster.queue)
    _paths(cluster)
    for name in cluster.environment:
        if name.startswith(_OWN_VARIABLES):
            raise ConfigError(f"cluster.environment has {name}, which the launcher sets itself; leave it out")
    for toleration in settings.tolerations:
        unknown = set(toleration) - set(_TOLERATION)
        if unknown:
            raise ConfigError(
                f"cluster.kubernetes.tolerations has {', '.join(sorted(unknown))}; use {', '.join(_TOLERATION)}"
            )


def size_bytes(key: str, quantity: str) -> int:
    """Bytes of a quantity with a binary unit. Raises ConfigError for anything else.

    >>> size_bytes("cluster.kubernetes.shm", "2Ki")
    2048
    """
    match = _QUANTITY.fullmatch(quantity)
    if match is None:
        raise ConfigError(f"{key}={quantity} is no size; use a whole number and Ki, Mi, Gi or Ti, as in 16Gi")
    return int(match[1]) * _UNITS[match[2][:1]]


def _needed(cluster: ClusterConfig) -> None:
    if cluster.image is None:
        raise ConfigError(f"cluster.backend={cluster.backend} needs an image; add cluster.image=REGISTRY/NAME:TAG")
    if not _TAG.fullmatch(cluster.image) or cluster.image.endswith(":latest"):
        raise ConfigError(
            f"cluster.image={cluster.image} may be another one at the next start; use a tag other than latest, or "
            "a digest"
        )
    if cluster.memory is None:
        raise ConfigError(f"cluster.backend={cluster.backend} needs a limit of memory; add cluster.memory=64G")
    shm = size_bytes("cluster.kubernetes.shm", cluster.kubernetes.shm)
    if shm >= int(cluster.memory[:-1]) * _UNITS[cluster.memory[-1]]:
        raise ConfigError(
            f"cluster.kubernetes.shm={cluster.kubernetes.shm} counts against cluster.memory={cluster.memory} and "
            "leaves nothing of it; use less"
        )


def _paths(cluster: ClusterConfig) -> None:
    settings = cluster.kubernetes
    paths = [settings.mount, *settings.claims.values()]
    for path in paths:
        if not path.startswith("/") or path in _OWN_PATHS or path != path.rstrip("/"):
            raise ConfigError(
                f"cluster.kubernetes mounts a claim at {path}; use an absolute path other than {', '.join(_OWN_PATHS)}"
            )
        if paths.count(path) > 1:
            raise ConfigError(f"cluster.kubernetes mounts two claims at {path}; give each a path of its own")


def _check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{what} is no name of a Kubernetes object; use small letters, digits and dashes")
