"""Which checkpoints stay: the newest, those that are permanent, and always one that is known to be whole."""

from __future__ import annotations

from collections.abc import Callable, Collection


def removable(steps: list[int], permanent: Collection[int], keep: int, is_valid: Callable[[int], bool]) -> list[int]:
    """The steps to remove, of `steps` in ascending order; raises ValueError when `keep` is below 1.

    The `keep` newest and all in `permanent` stay. When none of the newest is valid, the newest valid one stays too;
    `is_valid`, which reads whole checkpoints, is asked only as far as needed.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}, but at least one checkpoint must stay")
    newest, older = steps[-keep:], steps[:-keep]
    doomed = [step for step in older if step not in permanent]
    if doomed and not any(is_valid(step) for step in reversed(newest)):
        saved = next((step for step in reversed(older) if is_valid(step)), None)
        doomed = [step for step in doomed if step != saved]
    return doomed
