"""Which hosts a preflight calls bad: those that are wrong in themselves, or differ from most others."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from titans_dist.parallel.diagnosis import judge, judge_stuck
from titans_dist.parallel.machine import Findings, Product


def found(hosts: str = "abcd", each: int = 2, **changes: dict[int, Any]) -> list[Findings]:
    """What healthy GPUs find, `each` of them on every host (a letter); `changes` are a key's values by rank."""
    result = []
    for rank in range(len(hosts) * each):
        one = Findings(
            rank,
            hosts[rank // each],
            device="H100",
            versions={"torch": "2.13.0"},
            products={"bfloat16": Product(0.003 + 0.0001 * (rank % 3), "d1")},
            link_bytes_per_s=4e10 if rank % each == 0 else 3e11,
        )
        for key, by_rank in changes.items():
            if rank in by_rank:
                one = dataclasses.replace(one, **{key: by_rank[rank]})
        result.append(one)
    return result


def slow(seconds: float) -> dict[str, Product]:
    return {"bfloat16": Product(seconds, "d1")}


def test_healthy_machines_are_good() -> None:
    assert judge(found()).is_good
    assert judge(found("a", each=1, link_bytes_per_s={0: None})).is_good


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"products": {5: slow(0.005)}}, "its bfloat16 product takes 1.6 times as long as others'"),
        ({"products": {5: {"bfloat16": Product(0.003, "d2")}}}, "other bits of the same bfloat16 product"),
        ({"versions": {4: {"torch": "2.12.0"}, 5: {"torch": "2.12.0"}}}, "torch 2.12.0, most others 2.13.0"),
        ({"versions": {5: {}}}, "torch none, most others 2.13.0"),
        ({"clock_s": {4: 1.5, 5: 1.5}}, "its clock is +1.5 s off"),
        ({"problems": {4: ["run folder: full"], 5: ["run folder: full"]}}, "run folder: full"),
        ({"link_bytes_per_s": {4: 1e10, 6: 1e10}}, "its network is 4.0 times slower than others'"),  # both its links
        ({"wrong_link": {4: True, 6: True}}, "what b sent to c did not come as it was sent"),
        ({"wrong_link": {5: True}}, "what c sent to c did not come as it was sent"),
    ],
)
def test_a_bad_host_is_named(changes: dict[str, Any], why: str) -> None:
    diagnosis = judge(found(**changes))
    assert list(diagnosis.bad) == ["c"] and not diagnosis.common
    assert why in diagnosis.bad["c"][0]
    assert diagnosis.sentence().startswith("1 bad host: c (")


@pytest.mark.parametrize(
    "changes",
    [
        {"products": {5: slow(0.0045)}},  # a cool GPU beside a warm one
        {"link_bytes_per_s": {4: 1e10}},  # one slow link alone has two ends
        {"clock_s": {rank: 0.9 for rank in range(8)}},
        {"clock_s": {rank: 30.0 for rank in range(2, 8)} | {0: 30.0, 1: 30.0}},  # all alike: none is off
    ],
)
def test_what_is_within_bounds_is_not(changes: dict[str, Any]) -> None:
    assert judge(found(**changes)).is_good


def test_a_wrong_clock_of_rank_0_is_not_laid_to_all_others() -> None:
    assert list(judge(found(clock_s={rank: -20.0 for rank in range(2, 8)})).bad) == ["a"]


@pytest.mark.parametrize(
    ("diagnosed", "text"),
    [
        (found(problems={rank: ["run folder: full"] for rank in range(8)}), "on all hosts: run folder: full"),
        (found("ab", versions={0: {"torch": "2.12.0"}, 1: {"torch": "2.12.0"}}), "no value is the usual one"),
        (found(wrong_sum={rank: True for rank in range(8)}), "the sum over all processes is wrong"),
    ],
)
def test_what_is_no_single_hosts_fault_leaves_none_out(diagnosed: list[Findings], text: str) -> None:
    diagnosis = judge(diagnosed)
    assert not diagnosis.bad and not diagnosis.is_good
    assert text in diagnosis.sentence()


def test_processes_on_the_cores_of_one_cpu_are_not_compared_with_each_other() -> None:
    cpus = {"device": {rank: "cpu x86_64 AVX512" for rank in range(8)}}
    assert judge(found(**cpus, products={5: slow(0.02)})).is_good
    assert list(judge(found(**cpus, products={4: slow(0.02), 5: slow(0.02)})).bad) == ["c"]


def stuck(stages: dict[int, str | None], gone: tuple[int, ...] = (), *, is_stopped: bool = False) -> Any:
    """Of eight processes on a, b, c, d; those in `gone` have not given up."""
    everybody: list[Findings | None] = list(found(stage=stages, ended={rank: rank not in gone for rank in range(8)}))
    for rank, stage in stages.items():
        if stage is None:
            everybody[rank] = None
    return judge_stuck(everybody, 2, is_stopped=is_stopped)


MEETING = {rank: "meeting the others" for rank in range(8)}


@pytest.mark.parametrize(
    ("diagnosis", "why"),
    [
        (stuck(MEETING | {5: "a file in /dev/shm"}), "rank 5 did not get past a file in /dev/shm"),
        (stuck(MEETING | {5: "its device"}, gone=(5,)), "rank 5 is gone or hangs in its device"),
        (stuck(MEETING, gone=(5,)), "rank 5 is gone or hangs in meeting the others"),
        (stuck(MEETING | {5: None}), "rank 5 did not begin"),
        (stuck(MEETING | {5: "its device"}, gone=(5,), is_stopped=True), "rank 5 is gone or hangs in its device"),
    ],
)
def test_who_holds_the_others_up_is_named(diagnosis: Any, why: str) -> None:
    assert diagnosis.bad == {"c": [why]}
    assert not diagnosis.common


def test_where_all_stand_still_at_the_same_place_nobody_is() -> None:
    assert stuck(MEETING).common == ["no process got past meeting the others"]
    assert stuck(MEETING | {4: None, 5: None}).common == ["rank 4 did not begin", "rank 5 did not begin"]
    assert stuck(MEETING | {5: "its device"}, is_stopped=True).is_good


def test_where_most_hosts_are_silent_none_is_left_out() -> None:
    diagnosis = stuck(MEETING, gone=(2, 4, 6))
    assert not diagnosis.bad
    assert "c: rank 4 is gone or hangs in meeting the others" in diagnosis.sentence()
    assert list(stuck(MEETING, gone=(2, 4)).bad) == ["b", "c"]
