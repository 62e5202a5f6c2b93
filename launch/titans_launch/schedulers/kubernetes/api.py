"""The Kubernetes API through its official client, with errors as sentences.

Objects are made with strict validation of fields: otherwise the server drops what it does not know without a word.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from titans_dist.config import ConfigError, UserError
from titans_launch.schedulers.kubernetes.manifest import Object

TIMEOUT_S = (5.0, 30.0)
"""For a connection, and for an answer."""
_NOT_FOUND, _FORBIDDEN, _CONFLICT = 404, 403, 409


@dataclass(frozen=True)
class Kind:
    """A kind of custom objects."""

    group: str
    version: str
    plural: str
    title: str
    origin: str
    """Who brings it to a cluster."""

    @property
    def full(self) -> str:
        """As the definition of the kind is called."""
        return f"{self.plural}.{self.group}"


JOBSET = Kind("jobset.x-k8s.io", "v1alpha2", "jobsets", "JobSet", "JobSet")
TRAINJOB = Kind("trainer.kubeflow.org", "v1alpha1", "trainjobs", "TrainJob", "Kubeflow Trainer")
RAYJOB = Kind("ray.io", "v1", "rayjobs", "RayJob", "KubeRay")
RUNTIME = Kind(TRAINJOB.group, TRAINJOB.version, "clustertrainingruntimes", "ClusterTrainingRuntime", TRAINJOB.origin)
LOCALQUEUE = Kind("kueue.x-k8s.io", "v1beta2", "localqueues", "LocalQueue", "Kueue")

NAMESPACE, CLAIM, SECRET, ACCOUNT = "Namespace", "PersistentVolumeClaim", "Secret", "ServiceAccount"


class Api:
    """One namespace of one cluster. Every method raises UserError where the server cannot be reached or refuses."""

    def __init__(self, namespace: str, context: str | None) -> None:
        try:
            from kubernetes import client
        except ImportError:
            raise ConfigError(
                "Kubernetes needs the package kubernetes; pip install titans-dist[k8s], or use --dry-run and "
                "kubectl create -f"
            ) from None
        self.namespace = namespace
        configuration = _configuration(context)
        self._host = configuration.host
        connection = client.ApiClient(configuration)
        # Any: the client's own types do not know that raw answers can be had.
        self._custom: Any = client.CustomObjectsApi(connection)
        self._core: Any = client.CoreV1Api(connection)
        self._refusal = client.ApiException

    def has(self, kind: Kind) -> bool:
        """Whether the cluster knows a kind."""
        place = (kind.group, kind.version, self.namespace, kind.plural)
        return (
            self._look(f"to list {kind.full}", self._custom.list_namespaced_custom_object, *place, limit=1) is not None
        )

    def has_runtime(self, name: str) -> bool:
        """Whether the cluster offers a ClusterTrainingRuntime."""
        place = (RUNTIME.group, RUNTIME.version, RUNTIME.plural, name)
        return self._look(f"to show {RUNTIME.title} {name}", self._custom.get_cluster_custom_object, *place) is not None

    def get(self, kind: Kind, name: str) -> Object | None:
        """An object, or None where there is none of that name."""
        with self._asking(f"to show {kind.title} {name}"):
            return self._or_none(self._custom.get_namespaced_custom_object, *self._place(kind), name)

    def create(self, kind: Kind, made: Object, dry_run: bool = False) -> bool:
        """Make an object; False where there is one of that name. With `dry_run` the server does all but store it."""
        options = {"dry_run": "All"} if dry_run else {}
        with self._asking(f"to make {kind.title} {made['metadata']['name']}"):
            try:
                self._custom.create_namespaced_custom_object(
                    *self._place(kind), made, field_validation="Strict", _request_timeout=TIMEOUT_S, **options
                )
            except self._refusal as error:
                if error.status == _CONFLICT:
                    return False
                raise
            return True

    def delete(self, kind: Kind, name: str) -> bool:
        """Have an object deleted as soon as its pods are gone, which get SIGTERM; False where there is none."""
        with self._asking(f"to delete {kind.title} {name}"):
            call = self._custom.delete_namespaced_custom_object
            return self._or_none(call, *self._place(kind), name, propagation_policy="Foreground") is not None

    def has_core(self) -> bool:
        """Whether the server has core kinds at all; one for custom resources alone has not."""
        return self._look("to list the core kinds", self._core.get_api_resources, _preload_content=False) is not None

    def core(self, title: str, name: str) -> Object | None:
        """An object of a core kind, or the namespace itself; None: there is none of that name.

        One that this user may not look at is an empty one.
        """
        call, place = {
            NAMESPACE: (self._core.read_namespace, (name,)),
            CLAIM: (self._core.read_namespaced_persistent_volume_claim, (name, self.namespace)),
            SECRET: (self._core.read_namespaced_secret, (name, self.namespace)),
            ACCOUNT: (self._core.read_namespaced_service_account, (name, self.namespace)),
        }[title]
        answer = self._look(f"to show {title} {name}", call, *place, _preload_content=False)
        return json.loads(answer.data) if answer else answer

    def pods(self, selector: str) -> list[Object]:
        """Those with the labels, the newest last."""
        with self._asking("to list pods"):
            answer = self._core.list_namespaced_pod(
                self.namespace, label_selector=selector, _preload_content=False, _request_timeout=TIMEOUT_S
            )
            found: list[Object] = json.loads(answer.data)["items"]
        return sorted(found, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

    def log(self, pod: str, container: str, follow: bool) -> Iterator[bytes]:
        """What a container has printed; with `follow` until it ends."""
        with self._asking(f"to show the log of pod {pod}"):
            answer = self._core.read_namespaced_pod_log(
                pod, self.namespace, container=container, follow=follow, _preload_content=False
            )
            yield from answer.stream()

    def _place(self, kind: Kind) -> tuple[str, str, str, str]:
        return kind.group, kind.version, self.namespace, kind.plural

    def _look(self, what: str, call: Callable[..., Any], *place: str, **options: Any) -> Any:
        """What is there, or None; an empty object where this user may not look: the pods will see."""
        with self._asking(what):
            try:
                return self._or_none(call, *place, **options)
            except self._refusal as error:
                if error.status == _FORBIDDEN:
                    return {}
                raise

    def _or_none(self, call: Callable[..., Any], *place: str, **options: Any) -> Any:
        try:
            return call(*place, _request_timeout=TIMEOUT_S, **options)
        except self._refusal as error:
            if error.status == _NOT_FOUND:
                return None
            raise

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Say in one sentence what the server, or the way to it, refuses."""
        from urllib3.exceptions import HTTPError

        try:
            yield
        except self._refusal as error:
            raise _refused(self._host, what, error) from None
        except HTTPError as error:
            raise UserError(
                f"the Kubernetes server {self._host} cannot be reached ({_reason(error)}); see kubectl cluster-info"
            ) from None


def _configuration(context: str | None) -> Any:
    """The kubeconfig's, or that of the pod in which this runs."""
    from kubernetes import client, config

    found = client.Configuration()
    try:
        try:
            config.load_kube_config(context=context, client_configuration=found)
        except config.ConfigException:
            if context is not None:
                raise
            config.load_incluster_config(client_configuration=found)
    except config.ConfigException as error:
        raise ConfigError(
            f"no Kubernetes cluster is configured ({_line(error)}); set KUBECONFIG, or cluster.kubernetes.context to "
            "one of kubectl config get-contexts"
        ) from None
    return found


def _refused(host: str, what: str, error: Any) -> UserError:
    """Status 400 and 422 are of the object, which a new try does not mend."""
    try:
        said = json.loads(error.body)["message"]
    except (TypeError, ValueError, KeyError):
        said = error.reason
    sentence = f"the Kubernetes server {host} refuses {what}: {_line(said)}"
    return ConfigError(sentence) if error.status in (400, 422) else UserError(sentence)


def _reason(error: Exception) -> str:
    return _line(getattr(error, "reason", None) or error).rpartition(": ")[2]


def _line(text: object) -> str:
    return " ".join(str(text).split()).rstrip(".")
