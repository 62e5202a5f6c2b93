"""The scheduler of the backends jobset and trainjob."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import yaml

from titans_dist.config import ConfigError, UserError
from titans_launch.schedulers.job import Job, State, Submission
from titans_launch.schedulers.kubernetes import jobset, trainjob
from titans_launch.schedulers.kubernetes.api import (
    ACCOUNT,
    CLAIM,
    JOBSET,
    LOCALQUEUE,
    NAMESPACE,
    SECRET,
    TRAINJOB,
    Api,
    Kind,
)
from titans_launch.schedulers.kubernetes.manifest import RUN, Object, dump

GUIDE = "k8s/README.md"
STOP_TIMEOUT_S = 1800.0
"""Seconds that a job's pods get to save and go before its deletion is told to be too slow."""
LOOK_S = 1.0

_KINDS = {"jobset": JOBSET, "trainjob": TRAINJOB}
_CONTAINERS = {"jobset": jobset.CONTAINER, "trainjob": trainjob.NODE}
_RENDERERS = {"jobset": jobset.render, "trainjob": trainjob.render}


class Kubernetes:
    """Each job is one object, whose name is the job's id."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    @property
    def kind(self) -> Kind:
        """Of that object."""
        return _KINDS[self.backend]

    def render(self, job: Job) -> dict[str, str]:
        """See Scheduler."""
        title = f"{job.name}: written by titans-dist submit"
        return {f"{self.backend}.yaml": dump(title, _RENDERERS[self.backend](job))}

    def check(self, job: Job) -> None:
        """See Scheduler: the last thing is that the server makes the object, but for storing it."""
        made, api = _RENDERERS[self.backend](job), _api_of(job)
        if not api.has(self.kind):
            raise ConfigError(
                f"the cluster has no {self.kind.full}; {self.kind.origin} is to be installed, see {GUIDE}"
            )
        self._check_custom(api, job)
        if api.has_core():
            _check_core(api, job)
        if not api.create(self.kind, made, dry_run=True):
            self._refuse_other(api, job)

    def submit(self, job: Job, files: list[Path]) -> list[str]:
        """See Scheduler. An object of this run that has ended makes room."""
        api = _api_of(job)
        made = yaml.safe_load(files[0].read_text())
        if not api.create(self.kind, made):
            self._refuse_other(api, job)
            self._delete(api, job.name)
            if not api.create(self.kind, made):
                raise ConfigError(f"{self.kind.title} {job.name} has just been made by somebody else; see kubectl get")
        return [job.name]

    def states(self, submission: Submission) -> list[State]:
        """See Scheduler."""
        found = _api(submission).get(self.kind, submission.ids[0])
        return [] if found is None else [state(found)]

    def logs(self, submission: Submission, follow: bool) -> None:
        """See Scheduler. What earlier attempts and other nodes have printed is in the run folder on the claim."""
        api, seen = _api(submission), ""
        selector = f"jobset.sigs.k8s.io/jobset-name={submission.ids[0]},batch.kubernetes.io/job-completion-index=0"
        while True:
            is_last = not follow or all(each.is_over for each in self.states(submission))
            started = [pod for pod in api.pods(selector) if pod["status"].get("phase", "Pending") != "Pending"]
            if started and started[-1]["metadata"]["uid"] != seen:
                seen = started[-1]["metadata"]["uid"]
                for part in api.log(started[-1]["metadata"]["name"], _CONTAINERS[self.backend], follow):
                    sys.stdout.buffer.write(part)
                    sys.stdout.buffer.flush()
            elif is_last:
                if not seen:
                    raise UserError(f"no pod of {submission.name} is there; see titans-dist status {submission.name}")
                return
            if not follow:
                return
            time.sleep(LOOK_S)

    def cancel(self, submission: Submission) -> None:
        """See Scheduler. Pods get SIGTERM when their object is deleted, and the time to save."""
        if all(each.is_over for each in self.states(submission)):
            raise UserError(f"{submission.name} does not run any more, so there is nothing to cancel")
        self._delete(_api(submission), submission.ids[0])

    def requeue(self, submission: Submission) -> None:
        """See Scheduler. The object that was handed in is made anew, so that its restarts count from 0."""
        made = yaml.safe_load((Path(submission.run_dir) / "submit" / submission.files[0]).read_text())
        api = _api(submission)
        self._delete(api, submission.ids[0])
        if not api.create(self.kind, made):
            raise UserError(
                f"{self.kind.title} {submission.ids[0]} has just been made by somebody else; see kubectl get"
            )

    def _check_custom(self, api: Api, job: Job) -> None:
        cluster = job.config.cluster
        if cluster.queue is not None:
            if not api.has(LOCALQUEUE):
                raise ConfigError(
                    f"the cluster has no Kueue, so cluster.queue={cluster.queue} cannot be; leave it unset"
                )
            if api.get(LOCALQUEUE, cluster.queue) is None:
                raise ConfigError(
                    f"namespace {api.namespace} has no LocalQueue {cluster.queue}; see kubectl get localqueues"
                )
        if self.backend == "trainjob" and not api.has_runtime(cluster.kubernetes.runtime):
            raise ConfigError(
                f"the cluster has no ClusterTrainingRuntime {cluster.kubernetes.runtime}; make it as {GUIDE} says, or "
                "set cluster.kubernetes.runtime to one of kubectl get clustertrainingruntimes"
            )

    def _refuse_other(self, api: Api, job: Job) -> None:
        """Raise ConfigError unless the object that is there is one of this run that has ended."""
        found = api.get(self.kind, job.name)
        if found is None:
            return
        owner = found["metadata"].get("annotations", {}).get(RUN)
        if owner != job.run_dir.name:
            raise ConfigError(
                f"{self.kind.title} {job.name} in namespace {api.namespace} belongs to "
                f"{'something else' if owner is None else f'run {owner}'}; give this run another name="
            )
        now = state(found)
        if not now.is_over:
            raise ConfigError(
                f"{job.config.name} is {now.state.lower()} already as {self.kind.title} {job.name} in namespace "
                f"{api.namespace}; titans-dist cancel {job.config.name} ends it, and another name= is another run"
            )

    def _delete(self, api: Api, name: str) -> None:
        """Delete the object and wait until it and its pods are gone."""
        if not api.delete(self.kind, name):
            return
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while api.get(self.kind, name) is not None:
            if time.monotonic() > deadline:
                raise UserError(
                    f"the pods of {self.kind.title} {name} are not gone {STOP_TIMEOUT_S:.0f} s after they were told to "
                    "stop; see kubectl get pods, and delete those of nodes that are lost with --force"
                )
            time.sleep(LOOK_S)


def state(found: Object) -> State:
    """How the JobSet or TrainJob that the server has shown is, by its conditions."""
    status = found.get("status", {})
    true = {each["type"]: each for each in status.get("conditions", []) if each["status"] == "True"}
    ended = next((name for name in ("Completed", "Complete", "Failed") if name in true), None)
    jobs = status.get("replicatedJobsStatus") or status.get("jobsStatus") or []
    if ended is not None:
        word = "FAILED" if ended == "Failed" else "COMPLETED"
    elif "deletionTimestamp" in found["metadata"]:
        word = "STOPPING"
    elif "Suspended" in true or found["spec"].get("suspend"):
        word = "SUSPENDED"
    else:
        word = "RUNNING" if any(each.get("ready") for each in jobs) else "PENDING"
    details = [
        _restarts(found),
        true[ended].get("message", "") if ended else "",
        "waits for its queue" if word == "SUSPENDED" else "",
    ]
    return State(found["metadata"]["name"], word, ended is not None, "; ".join(filter(None, details)))


def _restarts(found: Object) -> str:
    """How often, and how many of those are held against the job."""
    status, policy = found.get("status", {}), found["spec"].get("failurePolicy", {})
    if not status.get("restarts"):
        return ""
    return (
        f"restarted {status['restarts']} times, {status.get('restartsCountTowardsMax', 0)} of "
        f"{policy.get('maxRestarts', 0)} counts"
    )


def _check_core(api: Api, job: Job) -> None:
    """Raise ConfigError for what the pods would wait for in vain."""
    settings, namespace = job.config.cluster.kubernetes, api.namespace
    if api.core(NAMESPACE, namespace) is None:
        raise ConfigError(f"the cluster has no namespace {namespace}; kubectl create namespace {namespace} makes it")
    wanted = [
        *((CLAIM, name) for name in (settings.claim, *settings.claims)),
        *((SECRET, name) for name in (*settings.secrets, settings.pull_secret) if name is not None),
        *((ACCOUNT, name) for name in (settings.service_account,) if name is not None),
    ]
    for title, name in wanted:
        found = api.core(title, name)
        if found is None:
            raise ConfigError(
                f"namespace {namespace} has no {title} {name}; make it as {GUIDE} says, or choose one of "
                f"kubectl get {title.lower()} -n {namespace}"
            )
        modes = found.get("spec", {}).get("accessModes", [])
        if (title, name) == (CLAIM, settings.claim) and modes and "ReadWriteMany" not in modes and job.nodes > 1:
            raise ConfigError(
                f"PersistentVolumeClaim {name} is {' and '.join(modes)}, but the pods of {job.nodes} nodes write to it "
                "at the same time; use one that is ReadWriteMany"
            )


def _api_of(job: Job) -> Api:
    settings = job.config.cluster.kubernetes
    return Api(settings.namespace, settings.context)


def _api(submission: Submission) -> Api:
    return Api(submission.namespace or "default", submission.context)
