"""The fire drill: its schedule, its verdict, and one with every kind of fault on real processes."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.launch import command_line
from titans_dist.checkpoint.store import Store
from titans_dist.config import UserError
from titans_dist.tracking import read_metrics
from titans_launch import drill


@given(st.integers(1, 60), st.integers(0, 99), st.integers(1, 4))
def test_a_schedule_is_a_function_of_its_seed_and_gives_every_kind_its_turn(count: int, seed: int, world: int) -> None:
    faults = drill.schedule(count, seed, world)
    assert faults == drill.schedule(count, seed, world)
    assert len(faults) == len({fault.step for fault in faults}) == count
    kinds = [kind for kind in drill.KINDS if world > 1 or kind != "full disk"]
    turns = Counter(fault.kind for fault in faults)
    assert set(turns) <= set(kinds)
    assert max(turns.values()) - min(turns.get(kind, 0) for kind in kinds) <= 1
    assert all(0 <= fault.rank < world for fault in faults)
    assert all(fault.rank > 0 for fault in faults if fault.kind == "full disk")
    assert [fault.step for fault in faults] == sorted(fault.step for fault in faults)


def test_a_damaged_checkpoint_is_one_that_does_not_verify(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for step in (1, 2):
        (store.begin(step) / "file").write_bytes(bytes(range(200)))
        store.commit(step, {})
    said: list[str] = []
    drill.damage(store, seed=3)
    assert store.newest_valid(said.append) == 1
    assert len(said) == 1 and str(store.folder(2)) in said[0]


def test_the_only_checkpoint_is_left_alone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (store.begin(1) / "file").write_bytes(b"x" * 100)
    store.commit(1, {})
    drill.damage(store, seed=3)
    store.verify(1)


# The verdict on runs that are made up


def written(folder: Path, losses: list[tuple[int, float]], resumed: dict[int, int] | None = None) -> None:
    folder.mkdir(parents=True)
    lines = []
    for number, (step, loss) in enumerate(losses):
        if resumed and number in resumed:
            lines.append({"kind": "event", "name": "resume", "step": resumed[number]})
        lines.append({"kind": "train", "step": step, "loss": loss})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def judged(folder: Path, losses: list[tuple[int, float]], resumed: dict[int, int] | None = None) -> int:
    written(folder / "undisturbed", [(step, 1 / step) for step in range(1, 7)])
    written(folder / "disturbed", losses, resumed)
    return drill._verdict(folder, [], 6, drill.Tally(), 1.0)


def test_a_resume_that_goes_on_is_right(tmp_path: Path) -> None:
    steps = [1, 2, 3, 4, 3, 4, 5, 6]
    assert judged(tmp_path, [(step, 1 / step) for step in steps], {4: 2}) == 0


@pytest.mark.parametrize(
    ("steps", "resumed", "sentence"),
    [
        ([1, 2, 3, 5, 6], {}, "the loss of step 4 differs"),
        ([1, 2, 3, 4, 4, 5, 6], {}, "step 4 came out of order"),
        ([1, 2, 3, 4, 4, 5, 6], {4: 2}, "step 4 came out of order"),
        ([1, 2, 3, 4, 5], {}, "the loss of step 6 differs"),
    ],
)
def test_lost_and_repeated_steps_are_found(
    steps: list[int], resumed: dict[int, int], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        judged(tmp_path, [(step, 1 / step) for step in steps], resumed)


def test_one_bit_of_one_loss_is_found(tmp_path: Path) -> None:
    import math

    losses = [(step, math.nextafter(1 / step, 2) if step == 5 else 1 / step) for step in range(1, 7)]
    with pytest.raises(UserError, match="the loss of step 5 differs"):
        judged(tmp_path, losses)


# The real thing


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_drill_with_every_kind_of_fault_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    done = command_line.run("drill", "name=drill", "--faults", "8", "--seed", "1", cwd=tmp_path, timeout_s=580)
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.findall(r"^fault \d/8 \| step \d+ \| ([a-z ]+?)(?: \| rank \d)?$", done.stdout, re.MULTILINE)
    assert sorted(told) == sorted(drill.KINDS)
    folder = tmp_path / "runs" / "drill" / "seed-1"
    rows = read_metrics(folder / "disturbed" / "metrics.jsonl")
    names = Counter(row["name"] for row in rows if row["kind"] == "event")
    assert names["resume"] >= 4 and names["redone"] == 1 and names["save_failed"] >= 1
