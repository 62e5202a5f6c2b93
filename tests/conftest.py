"""What every test shares: one thread per process, and a summary that never hides a skipped test."""

from __future__ import annotations

import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # before the first import of torch: forked ranks must not inherit a thread pool
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # looking for a GPU must not start CUDA: ranks are forked later

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton, which megatron-core brings too

from collections import Counter
from typing import Any

# The same examples in every run, and no judgment of speed: a busy machine changes no verdict.
settings.register_profile("titans", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("titans")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Always print how many tests were skipped or left out, and why, and which ones have failed at first."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[text.removeprefix("Skipped: ")] += 1
    terminalreporter.write_line(f"skipped tests: {sum(reasons.values())}")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"  {count} x {reason}")
    for report in terminalreporter.stats.get("rerun", []):
        terminalreporter.write_line(f"failed at first: {report.nodeid}")
        terminalreporter.write_line(f"  {report.longreprtext.rpartition(chr(10))[2]}")
    left_out = len(terminalreporter.stats.get("deselected", [])) or max(_left_out, default=0)
    if left_out:
        terminalreporter.write_line(f"left out by -m or -k: {left_out}")


# Tests side by side (-n 2): a file stays together for the sake of its fixtures, and a folder where all of its tests
# share one scheduler or API server.

TOGETHER = ("tests/slurm/", "tests/k8s/")
_left_out: list[int] = []
"""How many tests each process has left out; the same for all."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((folder for folder in TOGETHER if nodeid.startswith(folder)), nodeid.partition("::")[0])

    return ByFile(config, log)


def pytest_deselected(items: list[pytest.Item]) -> None:
    if items and (output := getattr(items[0].config, "workeroutput", None)) is not None:
        output["left_out"] = output.get("left_out", 0) + len(items)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    _left_out.append(getattr(node, "workeroutput", {}).get("left_out", 0))


# A shell starts its background jobs with SIGINT ignored, and their children inherit that: Ctrl-C could not be tested.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
