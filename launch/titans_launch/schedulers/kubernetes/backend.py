"""The scheduler of the backends jobset and trainjob; what needs Ray is a RayJob under both."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from titans_dist.config import ConfigError, UserError
from titans_dist.config.machines import on_ray
from titans_launch.schedulers.job import Job, State, Submission
from titans_launch.schedulers.kubernetes import jobset, rayjob, trainjob
from titans_launch.schedulers.kubernetes.api import (
    ACCOUNT,
    CLAIM,
    JOBSET,
    LOCALQUEUE,
    NAMESPACE,
    RAYJOB,
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


@dataclass(frozen=True)
class Form:
    """The kind of object that stands for a job."""

    kind: Kind
    render: Callable[[Job], Object]
    container: str | None
    """That of its pods whose output is the job's; None where that is elsewhere."""


FORMS = {
    "jobset": Form(JOBSET, jobset.render, jobset.CONTAINER),
    "trainjob": Form(TRAINJOB, trainjob.render, trainjob.NODE),
    "rayjob": Form(RAYJOB, rayjob.render, None),
}
"""By the name of the file that is handed in."""


class Kubernetes:
    """Each job is one object, whose name is the job's id."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def render(self, job: Job) -> dict[str, str]:
        """See Scheduler."""
        name = self._name(job)
        return {f"{name}.yaml": dump(f"{job.name}: written by titans-dist submit", FORMS[name].render(job))}

    def check(self, job: Job) -> None:
        """See Scheduler: the last thing is that the server makes the object, but for storing it."""
        form, api = FORMS[self._name(job)], _api_of(job)
        made = form.render(job)
        if not api.has(form.kind):
            raise ConfigError(
                f"the cluster has no {form.kind.full}; {form.kind.origin} is to be installed, see {GUIDE}"
            )
        self._check_custom(api, job)
        if api.has_core():
            _check_core(api, job)
        if not api.create(form.kind, made, dry_run=True):
            self._refuse_other(api, form.kind, job)

    def submit(self, job: Job, files: list[Path]) -> list[str]:
        """See Scheduler. An object of this run that has ended makes room."""
        api, kind = _api_of(job), FORMS[self._name(job)].kind
        made = yaml.safe_load(files[0].read_text())
        if not api.create(kind, made):
            self._refuse_other(api, kind, job)
            self._delete(api, kind, job.name)
            if not api.create(kind, made):
                raise ConfigError(f"{kind.title} {job.name} has just been made by somebody else; see kubectl get")
        return [job.name]

    def states(self, submission: Submission) -> list[State]:
        """See Scheduler."""
        found = _api(submission).get(_form(submission).kind, submission.ids[0])
        return [] if found is None else [state(found)]

    def logs(self, submission: Submission, follow: bool) -> None:
        """See Scheduler. What earlier attempts and other nodes have printed is in the run folder on the claim."""
        api, seen, container = _api(submission), "", _form(submission).container
        if container is None:
            raise UserError(
                f"what RayJob {submission.ids[0]} prints is on the head of its Ray cluster; kubectl exec with `ray job "
                "logs` shows it, and the results are in the ledger and report of the run folder"
            )
        selector = f"jobset.sigs.k8s.io/jobset-name={submission.ids[0]},batch.kubernetes.io/job-completion-index=0"
        while True:
            is_last = not follow or all(each.is_over for each in self.states(submission))
            started = [pod for pod in api.pods(selector) if pod["status"].get("phase", "Pending") != "Pending"]
            if started and started[-1]["metadata"]["uid"] != seen:
                seen = started[-1]["metadata"]["uid"]
                for part in api.log(started[-1]["metadata"]["name"], container, follow):
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
        self._delete(_api(submission), _form(submission).kind, submission.ids[0])

    def requeue(self, submission: Submission) -> None:
        """See Scheduler. The object that was handed in is made anew, so that its restarts count from 0."""
        made = yaml.safe_load((Path(submission.run_dir) / "submit" / submission.files[0]).read_text())
        api, kind = _api(submission), _form(submission).kind
        self._delete(api, kind, submission.ids[0])
        if not api.create(kind, made):
            raise UserError(f"{kind.title} {submission.ids[0]} has just been made by somebody else; see kubectl get")

    def _name(self, job: Job) -> str:
        """Of the form of a job."""
        return "rayjob" if on_ray(job.config) else self.backend

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
        if self._name(job) == "trainjob" and not api.has_runtime(cluster.kubernetes.runtime):
            raise ConfigError(
                f"the cluster has no ClusterTrainingRuntime {cluster.kubernetes.runtime}; make it as {GUIDE} says, or "
                "set cluster.kubernetes.runtime to one of kubectl get clustertrainingruntimes"
            )

    def _refuse_other(self, api: Api, kind: Kind, job: Job) -> None:
        """Raise ConfigError unless the object that is there is one of this run that has ended."""
        found = api.get(kind, job.name)
        if found is None:
            return
        owner = found["metadata"].get("annotations", {}).get(RUN)
        if owner != job.run_dir.name:
            raise ConfigError(
                f"{kind.title} {job.name} in namespace {api.namespace} belongs to "
                f"{'something else' if owner is None else f'run {owner}'}; give this run another name="
            )
        now = state(found)
        if not now.is_over:
            raise ConfigError(
                f"{job.config.name} is {now.state.lower()} already as {kind.title} {job.name} in namespace "
                f"{api.namespace}; titans-dist cancel {job.config.name} ends it, and another name= is another run"
            )

    def _delete(self, api: Api, kind: Kind, name: str) -> None:
        """Delete the object and wait until it and its pods are gone."""
        if not api.delete(kind, name):
            return
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while api.get(kind, name) is not None:
            if time.monotonic() > deadline:
                raise UserError(
                    f"the pods of {kind.title} {name} are not gone {STOP_TIMEOUT_S:.0f} s after they were told to "
                    "stop; see kubectl get pods, and delete those of nodes that are lost with --force"
                )
            time.sleep(LOOK_S)


def state(found: Object) -> State:
    """How the object that the server has shown is: a JobSet or TrainJob by its conditions."""
    status, name = found.get("status", {}), found["metadata"]["name"]
    if found["kind"] == RAYJOB.title:
        word, is_over = rayjob.state_of(status)
        return State(name, word, is_over, status.get("message", ""))
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
    return State(name, word, ended is not None, "; ".join(filter(None, details)))


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


def _form(submission: Submission) -> Form:
    return FORMS[Path(submission.files[0]).stem]


def _api_of(job: Job) -> Api:
    settings = job.config.cluster.kubernetes
    return Api(settings.namespace, settings.context)


def _api(submission: Submission) -> Api:
    return Api(submission.namespace or "default", submission.context)
