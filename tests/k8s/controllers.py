"""The parts of a cluster that act on a JobSet, by their published rules: for tests that want to see a job through."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.launch.command_line import ROOTS

Object = dict[str, Any]

INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
ATTEMPT = "metadata.annotations['jobset.sigs.k8s.io/restart-attempt']"


def job_failure(job: Object, pod: str, code: int, disrupted: bool) -> tuple[str, str]:
    """Reason and message with which the Job controller lets a Job fail of whose pods one has failed.

    The first rule that matches decides; what none matches counts against backoffLimit, which must be 0.
    """
    assert job["backoffLimit"] == 0
    for number, rule in enumerate(job["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        if (codes := rule.get("onExitCodes")) is not None:
            (container,) = job["template"]["spec"]["containers"]
            assert (codes["operator"], codes["containerName"]) == ("In", container["name"])
            if code in codes["values"]:
                what = f"Container {container['name']} for pod titans-dist/{pod} failed with exit code {code}"
                return "PodFailurePolicy", f"{what} matching FailJob rule at index {number}"
        elif disrupted and rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]:
            what = f"Pod titans-dist/{pod} has condition DisruptionTarget"
            return "PodFailurePolicy", f"{what} matching FailJob rule at index {number}"
    return "BackoffLimitExceeded", "Job has reached the specified backoff limit"


def jobset_action(policy: Object, reason: str, message: str) -> str:
    """What the JobSet controller does about it: the first rule that matches, else a restart that counts."""
    for rule in policy["rules"]:
        reasons, patterns = rule.get("onJobFailureReasons", []), rule.get("onJobFailureMessagePatterns", [])
        fits = not reasons or reason in reasons
        if fits and (not patterns or any(re.search(pattern, message) for pattern in patterns)):
            return str(rule["action"])
    return "RestartJobSet"


class Pod:
    """A pod as a process of this machine, which sees the annotations that the controllers give it.

    `hosts` are names and what they resolve to, in the place of the headless service.
    """

    def __init__(self, template: Object, index: int, attempt: int, scratch: Path, hosts: dict[str, str]) -> None:
        (container,) = template["spec"]["containers"]
        annotations = {INDEX: str(index), ATTEMPT: str(attempt)}
        variables: dict[str, str] = {}
        for each in container["env"]:
            field = each.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
            text = annotations[field] if field else expanded(each["value"], variables)
            variables[each["name"]] = hosts.get(text, text.replace("/tmp/", f"{scratch}/", 1))
        program, *arguments = (expanded(word, variables) for word in container["command"])
        assert program == "titans-dist"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "titans_launch", *arguments],
            cwd=container["workingDir"],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(ROOTS), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self) -> tuple[int, str]:
        """Exit code, and what was printed."""
        out, _ = self.process.communicate(timeout=100)
        return self.process.returncode, out


def expanded(text: str, variables: dict[str, str]) -> str:
    """As Kubernetes replaces $(NAME) of a variable that it knows; $$ is one $, and all else stays."""

    def put(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else variables.get(match[1], match[0])

    return re.sub(r"\$\$|\$\((\w+)\)", put, text)
