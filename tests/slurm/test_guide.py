"""Every command of slurm/README.md, one after the other, on a real cluster and at a small size."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.docs.test_readme import ROOT, TINY
from tests.slurm.cluster_of_two import STEPS, Cluster, Submitted, call, no_more_faults, slowly
from titans_dist.config.cluster import ClusterConfig, SlurmConfig

GUIDE = (ROOT / "slurm" / "README.md").read_text()
SMALL = (
    *(size for size in TINY if not size.startswith(("parallel", "training"))),
    *("data.tokenizer=bytes", "data.vocab_size=257", f"training.steps={STEPS}", "training.global_batch_size=8"),
)


def commands() -> list[str]:
    return [line for block in re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL) for line in block.splitlines()]


@pytest.mark.slurm
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_commands_of_the_guide_lead_to_a_run_that_was_resumed_twice(cluster: Cluster, folder: Path) -> None:
    slow = slowly(folder)
    start = 0
    for line in commands():
        program, *words = shlex.split(line)
        if program != "titans-dist":
            subprocess.run([program, *words], check=True, capture_output=True)
            continue
        if words[0] == "submit":
            batch = [] if "micro_batch" in line else ["training.micro_batch_size=4"]
            words += [*SMALL, *batch, slow]
            start += "name=first" in words and not {"--dry-run", "doctor"} & {*words}
        if words == ["requeue", "first"] or words == ["cancel", "first"]:
            Submitted(folder, "first").wait_for_training(start)
        done = call(folder, *words)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        if words == ["requeue", "first"]:
            start += 1
        if words == ["cancel", "first"]:
            no_more_faults(folder)
        if words == ["status", "first"]:
            # Else there would be no logs yet.
            Submitted(folder, "first").wait_for_training(start)
    first = Submitted(folder, "first")
    assert first.run.status == "done"
    assert sorted(first.run.steps) == [*range(1, STEPS + 1)]
    assert start == 3 and len(first.run.events("resume")) == 2


def test_the_keys_it_names_exist() -> None:
    keys = {field.name for field in dataclasses.fields(ClusterConfig)}
    slurm = {field.name for field in dataclasses.fields(SlurmConfig)}
    assert set(re.findall(r"cluster\.(\w+)", GUIDE)) <= keys
    assert set(re.findall(r"cluster\.slurm\.(\w+)", GUIDE)) <= slurm
    row = next(line for line in GUIDE.splitlines() if line.startswith("| `cluster.slurm.`:"))
    assert set(re.findall(r"`(\w+)`", row)) <= slurm
