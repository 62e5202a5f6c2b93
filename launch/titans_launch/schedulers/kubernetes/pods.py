"""The pods of a job: one for each node, which runs the launcher of that node's processes.

Nothing is written outside of the claim, /tmp and /dev/shm, and nothing runs as root.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from titans_dist.config import Config, ConfigError
from titans_launch.schedulers import snapshot
from titans_launch.schedulers.job import Job
from titans_launch.schedulers.kubernetes.manifest import Object, labels, literal

PORT = 29500
"""At which node 0 is found by the others; the pods of each job have their own addresses."""
EXIT_S = 60
"""Seconds after the longest save for the launcher to end its processes and write down what happened."""
TMP_SIZE = "16Gi"
"""Of /tmp, which holds the caches of compilers and libraries."""

ATTEMPT = "JOBSET_RESTART_ATTEMPT"
"""Variable: how often all pods of the job were started again."""

_TMP, _SHM, _RUNS = "/tmp", "/dev/shm", "runs"
_CACHES = {
    "HOME": f"{_TMP}/home",
    "XDG_CACHE_HOME": f"{_TMP}/cache",
    "TRITON_CACHE_DIR": f"{_TMP}/triton",
    "TORCHINDUCTOR_CACHE_DIR": f"{_TMP}/inductor",
    # getpass.getuser() fails where the image has no account of that number.
    "USER": "titans",
}
_TOPOLOGY = "kueue.x-k8s.io/podset-required-topology"
_INDEX = "batch.kubernetes.io/job-completion-index"
_ATTEMPT = "jobset.sigs.k8s.io/restart-attempt"


def grace_s(config: Config) -> int:
    """Seconds from SIGTERM to SIGKILL: more than the launcher waits for its processes, which is more than a save."""
    return max(config.cluster.grace_s, config.cluster.timeout_s) + EXIT_S


def run_dir(job: Job) -> str:
    """The run folder as the pods see it: on the claim, and the very one where this machine has it mounted there."""
    return str(job.run_dir) if _is_on_claim(job) else f"{_mount(job)}/{_RUNS}/{job.run_dir.name}"


def command(job: Job) -> list[str]:
    """What each pod runs. Raises ConfigError for a folder of configurations that only this machine has."""
    folders = [after for flag, after in zip(job.arguments, job.arguments[1:], strict=False) if flag == "--config-dir"]
    for folder in folders:
        if not PurePosixPath(folder).is_relative_to(_mount(job)):
            raise ConfigError(
                f"--config-dir {folder} is a folder of this machine, which pods do not see; copy it to the claim, "
                f"which is at {_mount(job)}, or give its values as overrides"
            )
    return [literal(word) for word in ("titans-dist", *job.words(run_dir(job)))]


def environment(job: Job) -> list[Object]:
    """Variables of every process."""
    values = {**_CACHES, **job.config.cluster.environment}
    if job.code is not None and _is_on_claim(job):
        values["PYTHONPATH"] = snapshot.python_path(job.code)
    return [{"name": name, "value": literal(value)} for name, value in values.items()]


def attempt(job: Job) -> list[Object]:
    """Variables by which the lease of checkpoints knows a later start of a job from an earlier one."""
    return [{"name": "JOBSET_NAME", "value": job.name}, _of_pod(ATTEMPT, _ATTEMPT)]


def rendezvous(job: Job, first_host: str) -> list[Object]:
    """Variables, with torchrun's names, by which the nodes of a job find each other; a node alone needs none."""
    if job.nodes == 1:
        return []
    values = {
        "PET_NNODES": str(job.nodes),
        "PET_NPROC_PER_NODE": str(job.per_node),
        "PET_MASTER_ADDR": first_host,
        "PET_MASTER_PORT": str(PORT),
        # Kubernetes puts in the variable that `attempt` makes.
        "PET_RDZV_ID": f"{job.name}-$({ATTEMPT})",
    }
    return [*({"name": name, "value": value} for name, value in values.items()), _of_pod("PET_NODE_RANK", _INDEX)]


def secrets(job: Job) -> list[Object]:
    """Secrets whose keys are variables."""
    return [{"secretRef": {"name": name}} for name in job.config.cluster.kubernetes.secrets]


def resources(job: Job) -> Object:
    """Requests equal limits: nothing of a training job may be taken for another pod."""
    cluster = job.config.cluster
    cpus = job.per_node * (cluster.cpus_per_process or cluster.threads + 1)
    amounts = {"cpu": str(cpus), "memory": f"{cluster.memory}i", **cluster.kubernetes.resources}
    if cluster.gpus_per_node:
        amounts[cluster.kubernetes.gpu] = str(cluster.gpus_per_node)
    return {"requests": amounts, "limits": dict(amounts)}


def mounts(job: Job) -> list[Object]:
    """Of each container."""
    settings = job.config.cluster.kubernetes
    return [
        {"name": "workspace", "mountPath": settings.mount},
        *(
            {"name": f"claim-{number}", "mountPath": path, "readOnly": True}
            for number, path in enumerate(settings.claims.values())
        ),
        {"name": "tmp", "mountPath": _TMP},
        {"name": "shm", "mountPath": _SHM},
    ]


def volumes(job: Job) -> list[Object]:
    """Of each pod."""
    settings = job.config.cluster.kubernetes
    return [
        {"name": "workspace", "persistentVolumeClaim": {"claimName": settings.claim}},
        *(
            {"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": name, "readOnly": True}}
            for number, name in enumerate(settings.claims)
        ),
        {"name": "tmp", "emptyDir": {"sizeLimit": TMP_SIZE}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shm}},
    ]


def container_security(job: Job) -> Object:
    """Of each container."""
    capabilities: Object = {"drop": ["ALL"]}
    if job.config.cluster.kubernetes.rdma:
        capabilities["add"] = ["IPC_LOCK"]
    return {
        "runAsNonRoot": True,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": capabilities,
    }


def security(job: Job) -> Object:
    """Of each pod. The group owns the volumes; it is not given each file of a large claim again at every start."""
    user = job.config.cluster.kubernetes.user
    return {
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": user,
        "fsGroup": user,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def tolerations(job: Job) -> list[Object]:
    """The taint of nodes with GPUs, and what is configured."""
    cluster = job.config.cluster
    of_gpus = [{"key": cluster.kubernetes.gpu, "operator": "Exists", "effect": "NoSchedule"}]
    return [*(of_gpus if cluster.gpus_per_node else []), *(dict(each) for each in cluster.kubernetes.tolerations)]


def remarks(job: Job) -> dict[str, str]:
    """Annotations of each pod."""
    settings = job.config.cluster.kubernetes
    topology = {_TOPOLOGY: settings.topology} if settings.topology else {}
    return {**topology, **settings.annotations}


def container(job: Job, name: str, variables: list[Object]) -> Object:
    """The launcher of one node."""
    cluster = job.config.cluster
    return _filled(
        {
            "name": name,
            "image": cluster.image,
            "imagePullPolicy": "IfNotPresent",
            "workingDir": cluster.kubernetes.mount,
            "command": command(job),
            "env": variables,
            "envFrom": secrets(job),
            "resources": resources(job),
            "securityContext": container_security(job),
            "volumeMounts": mounts(job),
        }
    )


def template(job: Job, container: Object) -> Object:
    """The pod of one node."""
    settings = job.config.cluster.kubernetes
    return {
        "metadata": _filled({"labels": labels(job), "annotations": remarks(job)}),
        "spec": _filled(
            {
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": grace_s(job.config),
                "serviceAccountName": settings.service_account,
                "automountServiceAccountToken": False,
                "enableServiceLinks": False,
                "imagePullSecrets": pull_secrets(job),
                "priorityClassName": settings.priority_class,
                "nodeSelector": dict(settings.node_selector),
                "tolerations": tolerations(job),
                "securityContext": security(job),
                "containers": [container],
                "volumes": volumes(job),
            }
        ),
    }


def pull_secrets(job: Job) -> list[Object]:
    """With which the image is pulled."""
    name = job.config.cluster.kubernetes.pull_secret
    return [] if name is None else [{"name": name}]


def _of_pod(variable: str, annotation: str) -> Object:
    return {"name": variable, "valueFrom": {"fieldRef": {"fieldPath": f"metadata.annotations['{annotation}']"}}}


def _filled(made: Object) -> Object:
    """Without what is empty."""
    return {key: value for key, value in made.items() if value not in (None, [], {})}


def _mount(job: Job) -> str:
    return job.config.cluster.kubernetes.mount


def _is_on_claim(job: Job) -> bool:
    return job.run_dir.is_relative_to(_mount(job))
