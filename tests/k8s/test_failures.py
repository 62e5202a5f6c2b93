"""What becomes of a job whose pods end: by the rules in its manifest, and in a run of two pods that is interrupted."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.k8s.conftest import free_ports
from tests.k8s.controllers import Pod, job_failure, jobset_action
from tests.k8s.manifests import BASE, rendered
from tests.k8s.objects import Object, only, templates
from tests.training.jobs import DATA_2, SIZES, finish
from titans_dist.tracking import losses, read_metrics

CASES = [
    (2, False, "FailJobSet"),
    (4, False, "FailJobSet"),
    (5, False, "FailJobSet"),
    (2, True, "FailJobSet"),  # a new start would end in the same way, wherever it is
    (3, True, "RestartJobSetAndIgnoreMaxRestarts"),
    (137, True, "RestartJobSetAndIgnoreMaxRestarts"),
    (1, True, "RestartJobSetAndIgnoreMaxRestarts"),
    (3, False, "RestartJobSet"),
    (1, False, "RestartJobSet"),
    (137, False, "RestartJobSet"),
    (42, False, "RestartJobSet"),
]


def parts(source: str) -> tuple[Object, Object]:
    """The Job and the failure policy of a JobSet, or of that which Trainer makes of our runtime."""
    spec = only(source, "JobSet" if source == "base" else "ClusterTrainingRuntime")["spec"]
    spec = spec if source == "base" else spec["template"]["spec"]
    (job,) = spec["replicatedJobs"]
    return job["template"]["spec"], spec["failurePolicy"]


@pytest.mark.parametrize("source", ["base", "trainer"])
@pytest.mark.parametrize(("code", "disrupted", "action"), CASES)
def test_wrong_configurations_fail_at_once_and_faults_of_the_machines_cost_nothing(
    source: str, code: int, disrupted: bool, action: str
) -> None:
    job, policy = parts(source)
    # A name that tries to look like another rule.
    assert jobset_action(policy, *job_failure(job, "at-index-0", code, disrupted)) == action


def test_a_time_limit_is_a_restart_that_counts() -> None:
    _, policy = parts("base")
    assert jobset_action(policy, "DeadlineExceeded", "Job was active longer than specified deadline") == "RestartJobSet"
    assert policy["maxRestarts"] == 100


def attempt(made: Object, number: int, folder: Path) -> list[Pod]:
    """All pods, as JobSet and Job controller make them."""
    (template,) = templates(made)
    (job,) = made["spec"]["replicatedJobs"]
    variables = {each["name"]: each.get("value", "") for each in template["spec"]["containers"][0]["env"]}
    hosts = {variables["PET_MASTER_ADDR"]: "127.0.0.1", variables["PET_MASTER_PORT"]: str(free_ports(1))}
    return [
        Pod(template, index, number, folder / "tmp", hosts) for index in range(job["template"]["spec"]["completions"])
    ]


@pytest.mark.slow
def test_a_run_on_two_nodes_of_which_one_is_drained_goes_on_where_it_was(tmp_path: Path) -> None:
    folder, steps = tmp_path / "claim", 80
    folder.mkdir()
    tiny = " ".join(
        (*SIZES, "data=synthetic", "data.vocab_size=320", f"training.steps={steps}", "checkpoint.interval=40")
    )
    made = rendered(f"{BASE} {tiny} cluster.kubernetes.mount={folder}")
    metrics = folder / "runs" / "titans" / "metrics.jsonl"

    pods = attempt(made, 0, tmp_path)
    deadline = time.monotonic() + 90
    while not metrics.exists() or not losses(metrics):
        assert [pod.process.poll() for pod in pods] == [None, None], [pod.end() for pod in pods]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pods[1].process.send_signal(signal.SIGTERM)  # its node is drained; nobody tells the other pod
    ends = [pod.end() for pod in pods]
    assert [code for code, _ in ends] == [3, 3], ends
    saved = max(losses(metrics))
    assert saved < steps

    (job,) = made["spec"]["replicatedJobs"]
    failure = job_failure(job["template"]["spec"], "titans-workers-0-1", ends[1][0], disrupted=True)
    assert jobset_action(made["spec"]["failurePolicy"], *failure) == "RestartJobSetAndIgnoreMaxRestarts"

    ends = [pod.end() for pod in attempt(made, 1, tmp_path)]
    assert [code for code, _ in ends] == [0, 0], ends
    done = [row["step"] for row in read_metrics(metrics) if row["kind"] == "train"]
    assert done == list(range(1, steps + 1))  # each once: nothing was lost

    unbroken = tmp_path / "unbroken"
    unbroken.mkdir()
    tiny_words = tiny.split()
    finish(unbroken, "train", "name=titans", *DATA_2, *tiny_words, world=2)
    assert losses(metrics) == losses(unbroken / "runs" / "titans" / "metrics.jsonl")
