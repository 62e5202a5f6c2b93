"""What is saved must be what is trained: a state that stands still while the model is updated is not committed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.small_training import Layout, SmallTraining
from tests.distributed import run_distributed
from titans_dist.checkpoint.saver import Saver
from titans_dist.checkpoint.staleness import stale
from titans_dist.checkpoint.store import Store
from titans_dist.config.run import CheckpointConfig


def save_frozen(rank: int, world: int, root: Path, frozen: str, says_updates: bool) -> list[str | None]:
    """Steps 1 and 4 are trained. Steps 2 and 3 save the state of step 1, by mistake and because no update was made."""
    training = SmallTraining(Layout())
    saver = Saver(Store(root), CheckpointConfig(keep=5, retries=0))
    errors = []
    for step, updates in ((1, 1), (2, 2), (3, 1), (4, 3)):
        if step in (1, 4):
            training.train(step, step)
        state = training.state()
        if step == 2:
            let_go_on(state, frozen)
        saver.start(step, state, {"health": {"updates": updates}} if says_updates else {})
        result = saver.wait()
        assert result is not None
        errors.append(result.error)
    saver.close()
    return errors


def let_go_on(state: dict[str, Any], frozen: str) -> None:
    """Change all of the state that is not frozen."""
    optimizer = state["optimizer"]
    moments = [box for moments in optimizer["param_state"].values() for box in moments["exp_avg"].values()]
    if frozen in ("weights", "moments"):
        for group in optimizer["optimizer"]["param_groups"]:
            group["step"] += 1
    weights = [value for value in state["model"].values() if getattr(value, "data", None) is not None]
    for part in {"weights": moments, "moments": weights, "all": []}[frozen]:
        part.data = part.data.detach() + 1


@pytest.mark.parametrize("frozen", ["all", "weights", "moments"])
def test_a_state_that_stands_still_is_refused_on_all_ranks(tmp_path: Path, frozen: str) -> None:
    errors, other = run_distributed(save_frozen, 2, tmp_path, frozen, True)
    assert errors == other
    trained, refused, without_update, later = errors
    assert (trained, without_update, later) == (None, None, None)
    assert refused is not None and "\n" not in refused
    assert "as in step 1, although the model was updated since: what is saved is not what is trained" in refused
    assert Store(tmp_path).committed() == [1, 3, 4]


def test_a_run_that_does_not_count_its_updates_is_taken_to_make_them(tmp_path: Path) -> None:
    errors = run_distributed(save_frozen, 2, tmp_path, "all", False)[0]
    assert [error is None for error in errors] == [True, False, False, True]


def judged(lr: float = 1e-3, first: bool = False, **changes: str) -> str | None:
    old = {"0/w": "a", "0/optimizer.state.exp_avg.w": "b", "1/v": "c", "step": "1"}
    moved = {"0/w": "A", "0/optimizer.state.exp_avg.w": "B", "1/v": "C", "step": "2"}
    before = {"step": 1, "meta": {"health": {"updates": 1}}, "digests": old}
    new = moved | changes
    return stale(new, {"health": {"updates": 2}}, [lr], None if first else before)


def test_each_rank_must_have_moved_and_its_name_is_told() -> None:
    assert judged() is None
    assert str(judged(**{"1/v": "c"})).startswith("rank 1 gave the same v as in step 1")
    assert str(judged(step="1")).startswith("the optimizer's step is 1 as in step 1")


def test_weights_may_stand_still_where_the_learning_rate_is_next_to_nothing() -> None:
    weights = {"0/w": "a", "1/v": "c"}
    assert judged(lr=0.0, **weights) is None
    assert judged(lr=1e-3, **weights) is not None
    assert judged(lr=0.0, **{"0/optimizer.state.exp_avg.w": "b"}) is not None, "moments always move"


def test_the_first_checkpoint_has_nothing_to_differ_from() -> None:
    assert judged(first=True, **{"0/w": "a", "1/v": "c"}, step="1") is None
