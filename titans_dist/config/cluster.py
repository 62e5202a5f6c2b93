"""The machines a job runs on, and what is handed to their scheduler. One description for all schedulers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SlurmConfig:
    """What only Slurm knows. Options have sbatch's own names; unset ones are left out of the script."""

    launcher: str = "srun"
    """What starts the processes: srun (one task for each) or torchrun (one task for each node, which starts them)."""
    container: str = "pyxis"
    """What runs cluster.image where there is one: pyxis (an option of srun, with Enroot) or apptainer."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features the nodes must have."""
    reservation: str | None = None
    """Reservation to run in."""
    nodelist: str | None = None
    """Nodes that must be among those of the job."""
    exclude: str | None = None
    """Nodes that must not; those that `doctor` found bad are left out beside them."""
    gres: str | None = None
    """Generic resources of each node, where the site does not know gpus-per-node, such as gpu:h100:8."""
    exclusive: bool = False
    """Whether no other job may share the nodes."""
    dependency: str | None = None
    """What must have happened before, such as afterok:4711."""
    mail_type: str | None = None
    """Events to mail about, such as END,FAIL."""
    mail_user: str | None = None
    """Whom to mail."""
    extra: list[str] = field(default_factory=list)
    """Further options of sbatch, as they are, such as --switches=1."""
    srun: list[str] = field(default_factory=list)
    """Further options of srun, as they are, such as --mpi=none."""
    setup: list[str] = field(default_factory=list)
    """Lines of bash before everything else on the first node, such as "module load cuda"."""


@dataclass
class KubernetesConfig:
    """What only Kubernetes knows."""

    namespace: str = "titans-dist"
    """Where the objects are made. It, the claim and the account are those of k8s/setup unless set otherwise."""
    context: str | None = None
    """Context of the kubeconfig. Unset: the current one."""
    claim: str = "titans-dist"
    """PersistentVolumeClaim, ReadWriteMany, that all pods mount at `mount`: run folders and data lie there."""
    mount: str = "/workspace"
    """Where it is mounted, and the working directory of the job."""
    claims: dict[str, str] = field(default_factory=dict)
    """Further claims: name -> path at which it is mounted read-only."""
    secrets: list[str] = field(default_factory=list)
    """Secrets whose keys become environment variables, such as one with WANDB_API_KEY."""
    service_account: str | None = "titans-dist"
    """Service account of the pods. Its token is not mounted. Unset: the namespace's default one."""
    pull_secret: str | None = None
    """Secret with which the image is pulled."""
    user: int = 10001
    """User and group of the processes, >= 1."""
    shm: str = "16Gi"
    """Size of /dev/shm, which counts against cluster.memory."""
    gpu: str = "nvidia.com/gpu"
    """Resource of a GPU."""
    resources: dict[str, str] = field(default_factory=dict)
    """Further resources of each pod, such as rdma/ib: 8."""
    rdma: bool = False
    """Whether the processes may lock memory, as RDMA needs (capability IPC_LOCK)."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Labels that nodes must have."""
    tolerations: list[dict[str, str]] = field(default_factory=list)
    """Taints that are tolerated beside that of the GPUs."""
    annotations: dict[str, str] = field(default_factory=dict)
    """Annotations of the pods, such as those of the provider's networks."""
    priority_class: str | None = None
    """Priority class of the pods."""
    topology: str | None = None
    """Topology level that all pods must share, as Kueue knows it, such as cloud.provider.com/topology-rack."""
    runtime: str = "titans-dist"
    """ClusterTrainingRuntime of backend=trainjob; it decides what failures mean. k8s/trainer has this one."""
    keep_hours: float = 168.0
    """Hours after its end for which the job's objects stay, > 0."""


@dataclass
class ClusterConfig:
    """The machines and how processes are started on them."""

    backend: str = "local"
    """What `submit` hands the job to: local (this machine), slurm, jobset or trainjob (both on Kubernetes)."""
    nodes: int = 1
    """Machines, >= 1."""
    gpus_per_node: int = 0
    """GPUs of each, >= 0, with one process for each GPU. 0: processes on CPUs."""
    processes_per_node: int | None = None
    """Processes on each, >= 1. Unset: one for each GPU; on CPUs those of the layout, evenly."""
    cpus_per_process: int | None = None
    """CPU cores for each process, >= 1. Unset: what the scheduler gives; on Kubernetes `threads` + 1."""
    memory: str | None = None
    """Memory of each node, such as 900G. Unset: what the scheduler gives; Kubernetes needs it."""
    time: str | None = None
    """Longest time of one start, as [DAYS-]HOURS:MINUTES:SECONDS. Unset: what the scheduler gives."""
    queue: str | None = None
    """Partition of Slurm, local queue of Kueue. Unset: the default one; none."""
    account: str | None = None
    """Whom the time is charged to on Slurm."""
    image: str | None = None
    """Container image. Unset: no container; Kubernetes needs one, with a tag or digest."""
    mounts: list[str] = field(default_factory=list)
    """Folders of the nodes to be seen in the container, as PATH or FROM:TO. The current folder is seen anyway."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of every process; no place for secrets: they end up in scripts and run folders."""
    grace_s: int = 300
    """Seconds before its end, at a time limit or preemption, at which the job is told to save, >= 10."""
    max_requeues: int = 100
    """How often the scheduler may start the job again, at a time limit, preemption or the loss of a node, >= 0."""
    timeout_s: int = 600
    """Seconds after which a collective that some process did not join is an error, >= 1."""
    threads: int = 1
    """CPU threads per process, >= 1."""
    max_restarts: int = 3
    """How often the launcher starts the processes again after one of them has died, >= 0; they go on from the newest
    checkpoint. What cannot work, such as a wrong configuration, is not started again."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """What only Slurm knows."""
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)
    """What only Kubernetes knows."""


@dataclass
class SubmitConfig:
    """What `titans-dist submit` hands in."""

    command: str = "train"
    """The command to run: train, prepare, evaluate, doctor, parallel-check or drill."""
    chain: int = 1
    """Jobs handed to Slurm, each of which begins when the one before it has ended, >= 1; they go on with one run."""
    array: list[str] = field(default_factory=list)
    """Overrides of each task of a Slurm array, such as "training.seed=1 optimizer.lr=3e-4"; task i trains NAME-i."""
