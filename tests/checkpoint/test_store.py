"""The commit protocol: whatever happens, the newest valid checkpoint is whole and the damaged ones are named."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from titans_dist.checkpoint.store import Store, entry
from titans_dist.config.errors import CheckpointError


def content(step: int, name: str) -> bytes:
    return hashlib.sha256(f"{step} {name}".encode()).digest() * 20_000


def save(store: Store, step: int) -> Path:
    folder = store.begin(step)
    (folder / "nested").mkdir()
    (folder / "a.bin").write_bytes(content(step, "a"))
    (folder / "nested" / "b.bin").write_bytes(content(step, "b"))
    return store.commit(step, {"tokens": step * 100})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "checkpoints")


def no_warning(sentence: str) -> None:
    pytest.fail(f"unexpected warning: {sentence}")


def test_empty_store_has_no_checkpoint(store: Store) -> None:
    assert store.committed() == []
    assert store.newest_valid(no_warning) is None


def test_commit_makes_the_newest_checkpoint(store: Store) -> None:
    for step in (10, 20):
        save(store, step)
    assert store.committed() == [10, 20]
    assert store.newest_valid(no_warning) == 20
    assert store.meta(20) == {"tokens": 2000}
    assert (store.root / "latest").read_text() == "step_00000020\n"
    manifest = json.loads((store.folder(20) / "manifest.json").read_text())
    assert manifest["files"]["nested/b.bin"] == {
        "size": 640_000,
        "sha256": hashlib.sha256(content(20, "b")).hexdigest(),
    }


def test_a_save_without_commit_is_no_checkpoint_and_is_named_in_a_warning(store: Store) -> None:
    save(store, 10)
    temporary = store.begin(20)
    (temporary / "a.bin").write_bytes(b"half")
    warnings: list[str] = []
    assert store.newest_valid(warnings.append) == 10
    assert store.leftovers() == [temporary]
    assert len(warnings) == 1 and str(temporary) in warnings[0]


def test_a_folder_without_manifest_is_no_checkpoint(store: Store) -> None:
    save(store, 10)
    (save(store, 20) / "manifest.json").unlink()
    warnings: list[str] = []
    assert store.committed() == [10]
    assert store.newest_valid(warnings.append) == 10
    assert "step_00000020" in warnings[0]
    with pytest.raises(CheckpointError, match=r"step_00000020 is not a checkpoint"):
        store.meta(20)


def test_begin_removes_the_leftover_of_the_same_step(store: Store) -> None:
    (store.begin(10) / "old.bin").write_bytes(b"old")
    assert list(store.begin(10).iterdir()) == []


def test_abort_leaves_nothing(store: Store) -> None:
    (store.begin(10) / "a.bin").write_bytes(b"half")
    store.abort(10)
    assert list(store.root.iterdir()) == []


def test_a_step_saved_again_replaces_the_old_one(store: Store) -> None:
    save(store, 10)
    (store.begin(10) / "c.bin").write_bytes(b"new")
    store.commit(10, {"second": True})
    assert store.meta(10) == {"second": True}
    assert sorted(path.name for path in store.folder(10).iterdir()) == ["c.bin", "manifest.json"]
    assert store.leftovers() == []


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"nested/b\.bin has 639999 bytes instead of 640000"),
        (flip, r"the content of nested/b\.bin has changed"),
        (Path.unlink, r"nested/b\.bin is missing"),
    ],
)
def test_a_damaged_file_is_named_and_the_one_before_is_used(
    store: Store, damage: Callable[[Path], None], message: str
) -> None:
    save(store, 10)
    damage(save(store, 20) / "nested" / "b.bin")
    with pytest.raises(CheckpointError, match=message):
        store.verify(20)
    warnings: list[str] = []
    assert store.newest_valid(warnings.append) == 10
    assert len(warnings) == 1 and "step_00000020 is damaged" in warnings[0]


@pytest.mark.parametrize("name", ["a.bin", "manifest.json"])
def test_one_flipped_bit_anywhere_in_any_file_is_found_and_the_one_before_is_used(store: Store, name: str) -> None:
    for step in (10, 20):
        (store.begin(step) / "a.bin").write_bytes(bytes(range(200)))
        store.commit(step, {"tokens": step, "losses": [0.1 * step], "text": "x"})
    path = store.folder(20) / name
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        warnings: list[str] = []
        assert store.newest_valid(warnings.append) == 10, bit
        assert len(warnings) == 1 and str(store.folder(20)) in warnings[0]
    path.write_bytes(whole)
    assert store.newest_valid(no_warning) == 20


def test_without_digests_only_sizes_are_compared(store: Store) -> None:
    flip(save(store, 10) / "a.bin")
    store.verify(10, digests=False)
    with pytest.raises(CheckpointError):
        store.verify(10)


def test_a_manifest_of_another_format_is_refused(store: Store) -> None:
    path = save(store, 10) / "manifest.json"
    path.write_text(path.read_text().replace('"format": 3', '"format": 2'))
    with pytest.raises(CheckpointError, match="of format 2; this version reads format 3"):
        store.verify(10)


def test_meta_that_is_not_json_commits_nothing(store: Store) -> None:
    store.begin(10)
    with pytest.raises(ValueError):
        store.commit(10, {"loss": float("nan")})
    assert store.committed() == []


def test_prune_keeps_the_newest_and_removes_old_leftovers(store: Store) -> None:
    for step in (10, 20, 30):
        save(store, step)
    store.begin(25)
    in_progress = store.begin(40)
    assert store.plan(keep=2) == [10]
    assert store.committed() == [10, 20, 30]
    assert store.prune(keep=2) == [10]
    assert store.committed() == [20, 30]
    assert store.leftovers() == [in_progress]


def test_prune_never_removes_the_newest_valid_one(store: Store) -> None:
    for step in (10, 20, 30, 40):
        save(store, step)
    for step in (30, 40):
        flip(store.folder(step) / "a.bin")
    reopened = Store(store.root)
    reopened.prune(keep=2)
    assert reopened.committed() == [20, 30, 40]
    with pytest.raises(ValueError, match="keep is 0"):
        reopened.prune(keep=0)


def test_permanent_ones_are_never_pruned(store: Store) -> None:
    for step in (10, 20, 30, 40):
        store.begin(step)
        store.commit(step, {}, permanent=step == 10)
    assert store.manifest(10)["permanent"]
    assert store.prune(keep=2) == [20]
    assert store.committed() == [10, 30, 40]


def test_what_is_later_than_the_step_gone_back_to_is_removed(store: Store) -> None:
    for step in (10, 20, 30):
        store.begin(step)
        store.commit(step, {}, permanent=step == 30)
    store.discard_after(10)
    assert store.committed() == [10]
    assert store.leftovers() == []
    assert (store.root / "latest").read_text() == "step_00000010\n"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("a.bin", {"size": 2}, r"a\.bin has 1 bytes instead of 2"),
        ("gone.bin", {}, r"gone\.bin is not in .* as this process sees it"),
    ],
)
def test_files_that_others_have_hashed_must_be_there(
    store: Store, name: str, change: dict[str, int], message: str
) -> None:
    """As where a rank's run folder is not the one that the others see."""
    path = store.begin(10) / "a.bin"
    path.write_bytes(b"x")
    found = entry(path)
    with pytest.raises(CheckpointError, match=message):
        store.commit(10, {}, files={name: found | change})
    assert store.committed() == []
    store.commit(10, {}, files={"a.bin": found})
    store.verify(10)


def test_a_store_can_be_read_without_torch() -> None:
    code = "import sys, titans_dist.checkpoint.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0


def save_for_ever(root: Path, first: int, committed: Connection) -> None:
    store = Store(root)
    for step in range(first, first + 10_000):
        save(store, step)
        committed.send(step)
        store.prune(keep=2)


def test_kill_at_any_moment_leaves_the_last_committed_checkpoint_whole(store: Store) -> None:
    dice = random.Random(0)
    context = multiprocessing.get_context("fork")
    last = 0
    leftovers = 0
    for _ in range(25):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=save_for_ever, args=(store.root, last + 1, sender))
        process.start()
        sender.close()
        receiver.poll(0.005 + dice.random() * 0.05)
        process.join(timeout=dice.random() * 0.03)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        try:
            while True:
                last = receiver.recv()
        except EOFError:
            receiver.close()
        newest = store.newest_valid(lambda sentence: None)
        # The kill may fall between the commit and the message about it, never the other way round.
        assert (newest or 0) in (last, last + 1)
        if newest is not None:
            store.verify(newest)
            assert (store.folder(newest) / "a.bin").read_bytes() == content(newest, "a")
            assert store.meta(newest) == {"tokens": newest * 100}
            last = newest
        leftovers += len(store.leftovers())
    assert last > 5 and leftovers > 0, "the kills must fall between and into saves, or this test shows nothing"
