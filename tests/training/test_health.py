"""What counts as unhealthy, and what is done about it, step by step."""

from __future__ import annotations

import json
import math
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_dist.config import HealthConfig
from titans_dist.training.health import MEMORY_ROWS, Health, is_spike

WINDOW = 16


def warm(**changes: float) -> Health:
    """A policy that has seen a window of healthy steps: losses about 4, norms about 1."""
    health = Health(HealthConfig(window=WINDOW, **changes))  # type: ignore[arg-type]
    noise = np.random.default_rng(0).normal(0, 0.1, (WINDOW, 2))
    for a, b in noise:
        health.passed(4 + a, 1 + b)
    return health


# What is unhealthy


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_unhealthy_from_the_first_step_on(value: float) -> None:
    health = Health(HealthConfig())
    for loss, norm in ((value, 1.0), (1.0, value)):
        finding = health.find(loss, norm)
        assert finding is not None and not finding.is_finite
    assert health.find(1.0, 1.0) is None


def test_a_spike_is_found_by_its_size_and_named() -> None:
    health = warm()
    assert health.find(4.2, 1.2) is None
    assert health.find(0.1, 0.01) is None  # better than expected is no fault
    loss, norm = health.find(40.0, 1.0), health.find(4.0, 30.0)
    assert loss is not None and loss.is_finite and loss.why.startswith("loss 40, the median is ")
    assert norm is not None and norm.is_finite and norm.why.startswith("gradient norm 30, the median is ")


def test_nothing_finite_is_judged_before_there_is_a_window() -> None:
    health = Health(HealthConfig(window=WINDOW))
    for _ in range(WINDOW - 1):
        health.passed(4.0, 1.0)
    assert health.find(4000.0, 1000.0) is None
    health.passed(4.0, 1.0)
    assert health.find(4000.0, 1000.0) is not None


def test_spikes_can_be_let_through() -> None:
    assert warm(spike=0).find(4000.0, 1000.0) is None
    assert warm(spike=0).find(math.nan, 1.0) is not None


def test_outliers_stay_out_of_the_statistics_that_judge_them() -> None:
    health = warm()
    for step in range(1, 100):  # were they let in, the median would be theirs after half a window
        assert health.find(40.0, 30.0) is not None
        health.act(step)
    assert health.find(4.1, 1.1) is None


@settings(deadline=None)
@given(
    st.lists(st.floats(0.1, 100), min_size=3, max_size=50), st.floats(0.1, 1000), st.floats(0.5, 50), st.floats(0.1, 10)
)
def test_the_limit_is_the_textbook_one_in_any_unit(
    before: list[float], value: float, limit: float, unit: float
) -> None:
    array = np.array(before)
    median = np.median(array)
    deviation = max(1.4826 * np.median(np.abs(array - median)), 0.05 * median)
    border = median + limit * deviation
    if abs(value - border) > 1e-6 * border:
        assert is_spike(value, deque(before), limit) == (value > border)
        assert is_spike(unit * value, deque(unit * x for x in before), limit) == (value > border)


def test_a_memory_that_grows_without_bound_is_named() -> None:
    health = Health(HealthConfig(memory_spike=20))
    layers = {f"blocks.{i}.memory": {"w_norm": 5.0 + i, "surprise_before": 2.0, "s_norm": None} for i in range(2)}
    for _ in range(MEMORY_ROWS):
        assert health.find_in_memories(layers) is None
    grown = {**layers, "blocks.1.memory": {**layers["blocks.1.memory"], "w_norm": 5000.0}}
    finding = health.find_in_memories(grown)
    assert finding is not None and finding.why == "w_norm 5000 in blocks.1.memory, the median is 6"
    lost = {**layers, "blocks.0.memory": {**layers["blocks.0.memory"], "surprise_before": math.nan}}
    finding = health.find_in_memories(lost)
    assert finding is not None and finding.why == "surprise_before nan in blocks.0.memory"
    assert Health(HealthConfig(memory_spike=0)).find_in_memories(lost) is None


# What is done


def test_the_ladder_is_climbed_rung_by_rung_and_ends() -> None:
    health = warm(skips=2, lower_steps=5, rollbacks=1)
    assert [health.act(step) for step in (100, 101)] == ["skip", "skip"]
    assert health.lr_scale(102) == 1
    assert health.act(102) == "lower"
    assert [health.lr_scale(step) for step in (103, 107, 108)] == [0.5, 0.5, 1]
    assert health.act(104) == "go back"
    health.gone_back(104, warm().state(), 90)
    assert (health.rollbacks, health.left_out, health.lr_scale(91)) == (1, 14, 1)
    assert [health.act(step) for step in (95, 96, 97)] == ["skip", "skip", "lower"]
    assert health.act(98) == "give up"


def test_rare_spikes_are_only_skipped_for_ever() -> None:
    health = warm(skips=2)
    assert {health.act(step) for step in range(100, 100 + 40 * WINDOW, WINDOW // 2)} == {"skip"}


def test_rungs_can_be_left_out() -> None:
    assert warm(skips=0, lower_lr=1, rollbacks=0).act(7) == "give up"
    assert warm(skips=0, lower_lr=1).act(7) == "go back"
    assert warm(skips=0).act(7) == "lower"


def test_the_data_that_was_left_out_adds_up() -> None:
    health = warm(rollbacks=9)
    health.gone_back(50, warm().state(), 40)
    later = health.state()
    health.gone_back(70, later, 60)
    assert health.left_out == 20


# A resume


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 80))
def test_a_resumed_run_decides_as_the_unbroken_one(seed: int, cut: int) -> None:
    chance = np.random.default_rng(seed)
    rows = np.exp(chance.normal(0, 1, (100, 2)) * chance.choice([0.1, 3], (100, 1), p=[0.8, 0.2]))

    def decisions(health: Health, first: int, last: int) -> list[str]:
        found = []
        for step in range(first, last):
            loss, norm = map(float, rows[step])
            if health.find(loss, norm) is None:
                health.passed(loss, norm)
                found.append(f"{health.lr_scale(step)}")
            else:
                found.append(health.act(step))
        return found

    policy = HealthConfig(window=8, spike=5, lower_steps=10)
    unbroken, before, after = Health(policy), Health(policy), Health(policy)
    wanted = decisions(unbroken, 0, 100)
    start = decisions(before, 0, cut)
    after.load(json.loads(json.dumps(before.state(), allow_nan=False)))
    assert start + decisions(after, cut, 100) == wanted
