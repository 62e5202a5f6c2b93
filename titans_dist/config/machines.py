"""What follows from the description of a cluster, and which descriptions are legal."""

from __future__ import annotations

import re

from titans_dist.config.checks import at_least, nearest_multiple, one_of, positive
from titans_dist.config.errors import ConfigError
from titans_dist.config.kubernetes import check_kubernetes
from titans_dist.config.layout import check_world, world_size
from titans_dist.config.run import Config

BACKENDS = ("local", "slurm", "jobset", "trainjob")
SUBMITTED = ("train", "prepare", "evaluate", "doctor", "parallel-check", "drill")
"""Commands that can be handed to a scheduler."""
SINGLE = ("prepare", "drill")
"""Those of them that start on the first node alone."""
LARGEST_PORT = 1 << 16

_TIME = re.compile(r"(?:(\d+)-)?(\d{1,2}):(\d{2}):(\d{2})")
_MEMORY = re.compile(r"[1-9]\d*[KMGT]")
_VARIABLE = re.compile(r"[A-Za-z_]\w*")


def on_ray(config: Config) -> bool:
    """Whether the submitted command is the driver of Ray's workers, which may be on all machines."""
    return config.submit.command == "evaluate" and bool(config.evaluation.tasks)


def has_layout(config: Config) -> bool:
    """Whether the submitted command is the processes of the layout, not one that starts what it needs."""
    return config.submit.command not in SINGLE and not on_ray(config)


def processes_per_node(config: Config) -> int:
    """Processes on each machine."""
    cluster = config.cluster
    if cluster.processes_per_node is not None:
        return cluster.processes_per_node
    return cluster.gpus_per_node or max(1, world_size(config.parallel) // cluster.nodes)


def processes(config: Config) -> int:
    """Processes on all machines together."""
    return config.cluster.nodes * processes_per_node(config)


def seconds(time: str) -> int:
    """Seconds of [DAYS-]HOURS:MINUTES:SECONDS. Raises ConfigError for anything else.

    >>> seconds("1-02:00:30")
    93630
    """
    match = _TIME.fullmatch(time)
    if match is None or int(match[3]) > 59 or int(match[4]) > 59:
        raise ConfigError(f"cluster.time={time} is no [DAYS-]HOURS:MINUTES:SECONDS, such as 24:00:00")
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def validate_cluster(config: Config) -> None:
    """Raise ConfigError for the first thing that no scheduler could do, one sentence with the mend."""
    cluster, submit = config.cluster, config.submit
    one_of("cluster.backend", cluster.backend, BACKENDS)
    one_of("cluster.slurm.launcher", cluster.slurm.launcher, ("srun", "torchrun"))
    one_of("cluster.slurm.container", cluster.slurm.container, ("pyxis", "apptainer"))
    one_of("submit.command", submit.command, SUBMITTED)
    for key, low in (
        ("nodes", 1),
        ("gpus_per_node", 0),
        ("grace_s", 10),
        ("max_requeues", 0),
        ("timeout_s", 1),
        ("threads", 1),
        ("max_restarts", 0),
    ):
        at_least(f"cluster.{key}", getattr(cluster, key), low)
    for key in ("processes_per_node", "cpus_per_process"):
        if getattr(cluster, key) is not None:
            at_least(f"cluster.{key}", getattr(cluster, key), 1)
    at_least("cluster.kubernetes.user", cluster.kubernetes.user, 1)
    positive("cluster.kubernetes.keep_hours", cluster.kubernetes.keep_hours)
    at_least("submit.chain", submit.chain, 1)
    _texts(config)
    _scheduler(config)


def check_processes(config: Config) -> None:
    """Raise ConfigError where the layout does not fill the machines exactly."""
    cluster, per_node = config.cluster, processes_per_node(config)
    if cluster.gpus_per_node and per_node != cluster.gpus_per_node:
        raise ConfigError(
            f"cluster.processes_per_node={per_node} and cluster.gpus_per_node={cluster.gpus_per_node} differ, but each "
            "process has a GPU of its own; leave cluster.processes_per_node unset"
        )
    wanted = world_size(config.parallel)
    if not cluster.gpus_per_node and cluster.processes_per_node is None and wanted % cluster.nodes:
        legal = nearest_multiple(wanted, cluster.nodes)
        raise ConfigError(
            f"{wanted} processes of the layout cannot be shared evenly by cluster.nodes={cluster.nodes}; "
            f"the nearest number that can is {legal}"
        )
    check_world(config, processes(config))


def _texts(config: Config) -> None:
    cluster = config.cluster
    if cluster.time is not None and seconds(cluster.time) <= cluster.grace_s:
        raise ConfigError(
            f"cluster.time={cluster.time} is over before a job told to save cluster.grace_s={cluster.grace_s} seconds "
            "before its end has begun; use more time or less grace"
        )
    if cluster.memory is not None and not _MEMORY.fullmatch(cluster.memory):
        raise ConfigError(f"cluster.memory={cluster.memory} is no size; use a whole number and K, M, G or T, as in 64G")
    for name in cluster.environment:
        if not _VARIABLE.fullmatch(name):
            raise ConfigError(f"cluster.environment has {name!r}, which is no name of an environment variable")
    for mount in cluster.mounts:
        if not all(part.startswith("/") for part in mount.split(":")) or mount.count(":") > 1:
            raise ConfigError(f"cluster.mounts has {mount}, which is neither /PATH nor /FROM:/TO")


def _scheduler(config: Config) -> None:
    cluster, submit = config.cluster, config.submit
    if cluster.backend != "slurm":
        for key, used in (("chain", submit.chain > 1), ("array", bool(submit.array))):
            if used:
                raise ConfigError(
                    f"submit.{key} is for cluster.backend=slurm, not {cluster.backend}; submit one run after the other"
                )
    if cluster.backend in ("jobset", "trainjob"):
        check_kubernetes(cluster)
    if cluster.backend == "local" and cluster.nodes > 1:
        raise ConfigError(
            f"cluster.backend=local is this machine, not cluster.nodes={cluster.nodes}; use cluster=slurm"
        )
    if submit.chain > 1 and submit.array:
        raise ConfigError("submit.chain and submit.array cannot be had together; use one of them")
