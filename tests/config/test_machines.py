"""The description of the machines: what follows from it, and what no scheduler could do is refused in one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from tests.config.test_validation import good, put
from titans_dist.config import ConfigError, validate
from titans_dist.config.machines import check_processes, processes, processes_per_node, seconds

K8S = {"cluster__backend": "jobset", "cluster__image": "registry/titans:1.0", "cluster__memory": "64G"}
SLURM = {"cluster__backend": "slurm"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"cluster__backend": "pbs"}, "cluster.backend=pbs"),
        ({"cluster__nodes": 0}, "cluster.nodes=0"),
        ({"cluster__processes_per_node": 0}, "cluster.processes_per_node=0"),
        ({"cluster__grace_s": 9}, "cluster.grace_s=9"),
        ({"cluster__slurm__launcher": "mpirun"}, "cluster.slurm.launcher=mpirun"),
        ({"submit__command": "info"}, "submit.command=info"),
        ({"submit__chain": 0}, "submit.chain=0"),
        ({"cluster__time": "24h"}, "cluster.time=24h is no [DAYS-]HOURS:MINUTES:SECONDS, such as 24:00:00"),
        ({"cluster__time": "1:60:00"}, "cluster.time=1:60:00 is no "),
        ({"cluster__time": "00:05:00"}, "cluster.time=00:05:00 is over before a job told to save"),
        ({"cluster__memory": "64GB"}, "cluster.memory=64GB is no size; use a whole number and K, M, G or T"),
        ({"cluster__environment": {"A B": "1"}}, "cluster.environment has 'A B', which is no name of"),
        ({"cluster__environment": {"A;rm -rf x": "1"}}, "which is no name of an environment variable"),
        ({"cluster__mounts": ["data:/data"]}, "cluster.mounts has data:/data, which is neither /PATH nor /FROM:/TO"),
        ({"cluster__mounts": ["/a:/b:/c"]}, "cluster.mounts has /a:/b:/c"),
        ({"submit__chain": 2}, "submit.chain is for cluster.backend=slurm, not local"),
        ({**K8S, "submit__array": ["training.seed=1"]}, "submit.array is for cluster.backend=slurm, not jobset"),
        ({**SLURM, "submit__chain": 2, "submit__array": ["training.seed=1"]}, "cannot be had together"),
        ({"cluster__nodes": 2}, "cluster.backend=local is this machine, not cluster.nodes=2; use cluster=slurm"),
        ({**K8S, "cluster__image": None}, "cluster.backend=jobset needs an image; add cluster.image="),
        ({**K8S, "cluster__image": "registry/titans"}, "cluster.image=registry/titans may be another one"),
        ({**K8S, "cluster__image": "titans:latest"}, "use a tag other than latest, or a digest"),
        ({**K8S, "cluster__memory": None}, "needs a limit of memory; add cluster.memory=64G"),
    ],
)
def test_what_no_scheduler_could_do_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        validate(put(good(), **changes))
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("changes", [K8S, SLURM, {**SLURM, "cluster__nodes": 100, "submit__chain": 9}])
def test_what_a_scheduler_can_do_is_not(changes: dict[str, Any]) -> None:
    validate(put(good(), **changes))


@pytest.mark.parametrize(
    ("changes", "each", "all_of_them"),
    [
        ({"parallel__tensor": 2}, 2, 2),  # of the layout
        ({"parallel__tensor": 2, "parallel__data": 4, "cluster__nodes": 4}, 2, 8),  # evenly
        ({"cluster__gpus_per_node": 8, "cluster__nodes": 4}, 8, 32),  # one for each GPU
        ({"cluster__processes_per_node": 3, "cluster__nodes": 2}, 3, 6),
    ],
)
def test_processes_follow_from_the_machines(changes: dict[str, Any], each: int, all_of_them: int) -> None:
    config = put(good(), **changes)
    assert (processes_per_node(config), processes(config)) == (each, all_of_them)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"cluster__gpus_per_node": 8, "cluster__processes_per_node": 4},
            "cluster.processes_per_node=4 and cluster.gpus_per_node=8 differ",
        ),
        (
            {"parallel__tensor": 2, "parallel__data": 2, "cluster__nodes": 3},
            "4 processes of the layout cannot be shared evenly by cluster.nodes=3; the nearest number that can is 3",
        ),
        (
            {"parallel__tensor": 3, "cluster__gpus_per_node": 8},
            "8 processes do not fit parallel.tensor=3; use a multiple of 3 processes",
        ),
        (
            {"parallel__data": 4, "cluster__gpus_per_node": 8},
            "8 processes do not fit parallel.tensor=1 x parallel.data=4",
        ),
    ],
)
def test_a_layout_that_does_not_fill_the_machines_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        check_processes(put(good(), **changes))
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "value"), [("00:00:30", 30), ("1:00:00", 3600), ("24:00:00", 86400), ("2-00:00:01", 172801)]
)
def test_seconds_of_a_time(text: str, value: int) -> None:
    assert seconds(text) == value
