"""What is kept: the newest, the permanent, and always one that is whole."""

from __future__ import annotations

import itertools

import pytest

from titans_dist.checkpoint.retention import removable

STEPS = [10, 20, 30, 40, 50]


def removed(keep: int, permanent: tuple[int, ...] = (), damaged: tuple[int, ...] = ()) -> list[int]:
    return removable(STEPS, permanent, keep, lambda step: step not in damaged)


def test_the_newest_stay() -> None:
    assert removed(2) == [10, 20, 30]
    assert removed(7) == []


def test_permanent_ones_stay_beside_the_newest() -> None:
    assert removed(2, permanent=(10, 30)) == [20]
    assert removed(2, permanent=(40,)) == [10, 20, 30], "one of the newest takes no place of another"


def test_while_none_of_the_newest_is_valid_the_newest_valid_one_stays() -> None:
    assert removed(2, damaged=(40, 50)) == [10, 20]
    assert removed(2, damaged=(30, 40, 50)) == [10, 30]
    assert removed(2, permanent=(30,), damaged=(40, 50)) == [10, 20], "a permanent one is good enough"


def test_whole_checkpoints_are_read_only_as_far_as_needed() -> None:
    asked: list[int] = []

    def is_valid(step: int) -> bool:
        asked.append(step)
        return True

    assert removable(STEPS, (), 2, is_valid) == [10, 20, 30]
    assert asked == [50]


def test_something_valid_stays_whatever_is_damaged() -> None:
    for count in range(len(STEPS)):
        for damaged in itertools.combinations(STEPS, count):
            for keep in range(1, 6):
                stays = set(STEPS) - set(removed(keep, damaged=damaged))
                newest_valid = max(set(STEPS) - set(damaged))
                assert newest_valid in stays


def test_to_keep_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="keep is 0"):
        removed(0)
