"""`titans-dist doctor` as a job of a real Slurm: every process of both nodes takes part, under the node's own name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.runs import rows
from tests.slurm.cluster_of_two import RANKS_4, Cluster, submit

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_the_preflight_of_two_nodes(cluster: Cluster, folder: Path, launcher: str) -> None:
    launched = f"cluster.slurm.launcher={launcher}"
    job = submit(folder, "preflight", "--command", "doctor", *RANKS_4, launched, "cluster.timeout_s=120")
    job.wait_until_over()
    assert job.states == ["COMPLETED"], job.log()
    assert [cells[:2] for cells in rows(job.log())[1:]] == [["n1", "2"], ["n2", "2"]]
    assert "all is well" in job.log()
