"""The data in a checkpoint: a few integers, from which a run goes on, also with another mixture."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest

from titans_data import (
    BatchSchedule,
    DataError,
    Mixture,
    RowOrder,
    SourceIdentity,
    Stage,
    check_sources,
    data_state,
    resume_mixture,
    usage,
)

ROWS = {"a": 100, "b": 37, "c": 11}
GLOBAL_BATCH = 6


def source(which: str, **changes: Any) -> SourceIdentity:
    fields = {"name": which, "fingerprint": f"print-{which}", "tokenizer": "bpe", "tokens": ROWS[which] * 10 + 1}
    return SourceIdentity(**({**fields, "rows": ROWS[which]} | changes))


def schedule(mixture: Mixture, sources: list[SourceIdentity]) -> BatchSchedule:
    return BatchSchedule(mixture, [RowOrder(each.rows, sum(map(ord, each.fingerprint))) for each in sources])


def mixture(shares: dict[str, int], *later: tuple[int, dict[str, int]]) -> Mixture:
    names = list(shares)
    stages = [Stage(step, tuple(each.get(name, 0) for name in names)) for step, each in [(0, shares), *later]]
    return Mixture(names, stages, GLOBAL_BATCH)


def saved_at(step: int, mixed: Mixture, sources: list[SourceIdentity]) -> dict[str, Any]:
    """The state as it comes back from a checkpoint's JSON."""
    return json.loads(json.dumps(data_state(schedule(mixed, sources), sources, step)))


def drawn_rows(schedule: BatchSchedule, steps: range, source: int) -> list[int]:
    """The rows of one source in the order in which they come."""
    rows = np.concatenate([schedule.rows(step) for step in steps])
    first, last = schedule._offsets[source], schedule._offsets[source + 1]
    return (rows[(first <= rows) & (rows < last)] - first).tolist()


def test_the_state_is_a_few_integers_and_fingerprints() -> None:
    sources = [source("a"), source("b")]
    state = saved_at(10, mixture({"a": 2, "b": 1}), sources)
    assert [each["drawn"] for each in state["sources"]] == [40, 20]
    assert state["step"] == 10
    assert len(json.dumps(state)) < 1000


def test_the_same_mixture_goes_on_as_if_nothing_had_happened() -> None:
    mixed, sources = mixture({"a": 2, "b": 1}, (7, {"b": 1})), [source("a"), source("b")]
    for step in (1, 6, 7, 20):
        resumed, merged, edited = resume_mixture(saved_at(step, mixed, sources), mixed, sources)
        assert (resumed.stages, merged, edited) == (mixed.stages, sources, False)


def test_an_edit_keeps_what_every_source_has_given() -> None:
    sources = [source("a"), source("b")]
    before, after = mixture({"a": 2, "b": 1}), mixture({"a": 1, "b": 1})
    resumed, merged, edited = resume_mixture(saved_at(5, before, sources), after, sources)
    assert edited
    assert resumed.stages == (Stage(0, (2, 1)), Stage(5, (1, 1)))
    old, new = schedule(before, sources), schedule(resumed, merged)
    for step in range(5):
        assert old.rows(step).tolist() == new.rows(step).tolist()
    for number, each in enumerate(sources):
        order = RowOrder(each.rows, sum(map(ord, each.fingerprint)))
        rows = drawn_rows(new, range(12), number)
        assert rows == order.rows(np.arange(len(rows))).tolist(), "no row of a source is skipped or repeated"


def test_edits_add_up_over_several_resumes() -> None:
    sources = [source("a"), source("b")]
    mixed = mixture({"a": 1, "b": 1})
    for step, shares in [(3, {"a": 5, "b": 1}), (8, {"a": 1, "b": 0}), (9, {"a": 1, "b": 2})]:
        mixed, sources, edited = resume_mixture(saved_at(step, mixed, sources), mixture(shares), sources)
        assert edited
    assert [stage.step for stage in mixed.stages] == [0, 3, 8, 9]
    again, _, edited = resume_mixture(saved_at(11, mixed, sources), mixture({"a": 1, "b": 2}), sources)
    assert (again.stages, edited) == (mixed.stages, False)


def test_a_stage_that_is_still_to_come_may_change() -> None:
    sources = [source("a"), source("b")]
    before, after = (mixture({"a": 1, "b": 1}, (step, {"a": 1})) for step in (20, 30))
    resumed, _, edited = resume_mixture(saved_at(10, before, sources), after, sources)
    assert edited
    assert [stage.step for stage in resumed.stages] == [0, 30]


def test_a_new_source_begins_at_its_first_row_and_an_old_one_ends() -> None:
    old = [source("a"), source("b")]
    new = [source("c"), source("b")]
    resumed, merged, edited = resume_mixture(
        saved_at(4, mixture({"a": 1, "b": 1}), old), mixture({"c": 1, "b": 1}), new
    )
    assert edited
    assert [each.name for each in merged] == ["a", "b", "c"]
    assert resumed.stages == (Stage(0, (1, 1, 0)), Stage(4, (0, 1, 1)))
    assert resumed.drawn(4) == [12, 12, 0]
    assert resumed.drawn(6) == [12, 18, 6]
    back, merged, _ = resume_mixture(saved_at(6, resumed, merged), mixture({"a": 1, "b": 1}), old)
    assert [each.name for each in merged] == ["a", "b", "c"]
    assert back.drawn(8) == [18, 24, 6], "a source that comes back goes on"


def test_a_dataset_is_known_by_its_content_not_by_its_name() -> None:
    renamed = source("b", name="books")
    resumed, merged, edited = resume_mixture(
        saved_at(4, mixture({"a": 1, "b": 1}), [source("a"), source("b")]),
        mixture({"books": 1, "a": 1}),
        [renamed, source("a")],
    )
    assert not edited
    assert [each.name for each in merged] == ["a", "books"]
    assert resumed.drawn(10) == [30, 30]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fingerprint": "x", "tokens": 12}, "it has 12 tokens and had 371"),
        ({"fingerprint": "x", "tokenizer": "other-tokenizer"}, "its tokenizer is other-tokeni and was bpe"),
        ({"fingerprint": "x"}, "its fingerprint is x and was print-b"),
    ],
)
def test_another_dataset_under_an_old_name_is_refused_with_what_differs(changes: dict[str, Any], words: str) -> None:
    saved = saved_at(4, mixture({"a": 1, "b": 1}), [source("a"), source("b")])
    with pytest.raises(DataError, match=f"b is not the dataset this run has read: {words}; give back the old"):
        resume_mixture(saved, mixture({"a": 1, "b": 1}), [source("a"), source("b", **changes)])


def test_a_source_of_another_tokenizer_is_refused() -> None:
    saved = saved_at(4, mixture({"a": 1}), [source("a")])
    with pytest.raises(DataError, match=r"a and c were made with different tokenizers \(bpe and llama\): prepare"):
        resume_mixture(saved, mixture({"a": 1, "c": 1}), [source("a"), source("c", tokenizer="llama")])
    with pytest.raises(DataError, match="different tokenizers"):
        check_sources([source("a"), source("b", tokenizer=None)])


def test_the_same_dataset_twice_is_refused() -> None:
    with pytest.raises(DataError, match="a and b are the same dataset: name it once, with a larger weight"):
        check_sources([source("a"), source("b", fingerprint="print-a")])


def test_usage_says_what_was_repeated_and_what_was_never_read() -> None:
    sources = [source("a"), source("b"), source("c")]
    order = schedule(mixture({"a": 1, "b": 1, "c": 0}), sources)
    rows = [usage(order, sources, step) for step in (0, 10, 20)]
    assert [(each.drawn, each.unread, each.repeated) for each in rows[0]] == [(0, 100, 0), (0, 37, 0), (0, 11, 0)]
    assert [(each.drawn, each.unread, each.repeated) for each in rows[1]] == [(30, 70, 0), (30, 7, 0), (0, 11, 0)]
    assert [(each.drawn, each.unread, each.repeated) for each in rows[2]] == [(60, 40, 0), (60, 0, 23), (0, 11, 0)]
    for number, each in enumerate(rows[2]):
        seen = drawn_rows(order, range(20), number) if each.drawn else []
        assert (len(seen), len(set(seen))) == (each.drawn, each.rows - each.unread)
        assert list(itertools.islice(seen, each.rows)) == list(dict.fromkeys(seen)), "no repeat before the end"
