"""The cache of a node: bounded, whole files only, shared by processes that may be killed at any moment."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.data.caches import QUICK, URL, assert_says, assert_whole, objects
from tests.data.remotes import FaultyProxy, endpoint_variables
from titans_data import DataError, MdsSource
from titans_data.cache import ShardCache
from titans_data.locks import locked, take_lock

Start = Callable[..., "subprocess.Popen[str]"]

# Processes that read spans at random and compare them with the folder, one for each cache_bytes.
# Arguments: URL, cache, folder, seconds, cache_bytes...
READERS = """
import os, random, sys, time
from titans_data import MdsSource
from titans_data._imports import import_streaming
from titans_data.remote import Retries

def read(seed, cache_bytes):
    source = MdsSource(url, "train", cache, cache_bytes, Retries(4, 0.01, 5.0))
    draw, end = random.Random(seed), time.monotonic() + float(seconds)
    while time.monotonic() < end:
        start = draw.randrange(source.num_tokens - 300)
        ours, theirs = source.read(start, 300), local.read(start, 300)
        assert all((a == b).all() for a, b in zip(ours, theirs)), start

url, cache, folder, seconds, *bounds = sys.argv[1:]
local = MdsSource(folder)
import_streaming()  # takes seconds: once, before the forks
for seed, cache_bytes in enumerate(map(int, bounds)):
    if os.fork() == 0:
        read(seed, cache_bytes)
        print("right", flush=True)
        os._exit(0)
for _ in bounds:
    os.wait()
"""


@pytest.fixture
def open_copy(prepared: Any, tmp_path: Path) -> Callable[..., MdsSource]:
    """Open the dataset by its file URL with a cache in the test's folder."""

    def run(cache_bytes: int = 1 << 20, folder: Path = prepared.folder, **more: Any) -> MdsSource:
        return MdsSource(folder.as_uri(), "train", tmp_path / "cache", cache_bytes, QUICK, **more)

    return run


def bytes_below(cache: Path) -> int:
    """What the cache takes at one moment, downloads at work included and cards, which are not of its accounts, not."""
    total = 0
    with locked(cache / "lock"):
        for path in (*(cache / "objects").iterdir(), *(cache / "incoming").glob("[1-9]*/file*")):
            with suppress(FileNotFoundError):
                total += path.stat().st_size
    return total


def fill_disk(path: Path) -> None:
    with path.open("ab", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))


def place(cache: ShardCache, file: Any, folder: Path) -> None:
    os.close(cache.open(file, lambda path: shutil.copy(folder / file.name, path) and None))


# ---- the bound


def test_two_of_the_largest_files_are_the_least_bound(
    smallest: int, open_copy: Callable[..., MdsSource], prepared: Any
) -> None:
    with pytest.raises(DataError, match=rf"may have {smallest - 1} bytes .*: give cache_bytes of at least {smallest}"):
        open_copy(smallest - 1)
    source = open_copy(smallest)
    assert source.read(0, source.num_tokens)[0].tolist() == prepared.train.tokens


def test_the_files_used_last_stay(prepared: Any, files: list[Any], tmp_path: Path) -> None:
    shards = files[1:]
    cache = ShardCache(tmp_path, sum(file.size_bytes for file in shards[:3]) + 10)
    for age, file in zip((30, 10, 20), shards[:3], strict=True):
        place(cache, file, prepared.folder)
        stamp = time.time() - age * 1000
        os.utime(tmp_path / "objects" / f"{file.sha256}.mds", (stamp, stamp))
    place(ShardCache(tmp_path), shards[0], prepared.folder)  # used again, by another
    place(cache, shards[3], prepared.folder)
    assert {path.stem for path in objects(tmp_path)} == {shards[number].sha256 for number in (0, 1, 3)}


def test_a_cache_smaller_than_what_is_read_says_so_once(
    smallest: int, open_copy: Callable[..., MdsSource], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    source = open_copy(smallest)
    for _ in range(3):
        source.read(0, source.num_tokens)
    words = f"cache_bytes={smallest} or the disk of {tmp_path}/cache is smaller than the working set"
    assert caplog.text.count(words) == 1
    caplog.clear()
    source = open_copy(1 << 20)
    for _ in range(3):
        source.read(0, source.num_tokens)
    assert "working set" not in caplog.text


def test_three_processes_stay_within_the_bound(
    prepared: Any, smallest: int, start: Start, script: Callable[[str], Path], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    readers = start(script(READERS), prepared.folder.as_uri(), cache, prepared.folder, 2, *[smallest] * 3)
    largest = 0
    while readers.poll() is None:
        if (cache / "lock").exists():
            largest = max(largest, bytes_below(cache))
        time.sleep(0.002)
    assert_says(readers, *["right"] * 3)
    assert smallest // 2 < largest <= smallest
    assert_whole(cache)


def test_two_runs_with_other_bounds_read_right(
    prepared: Any, smallest: int, start: Start, script: Callable[[str], Path], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    runs = start(script(READERS), prepared.folder.as_uri(), cache, prepared.folder, 1, smallest, 1 << 20)
    runs.wait()
    assert_says(runs, "right", "right")
    assert_whole(cache)


# ---- one download per node


def test_a_shard_that_several_want_is_downloaded_once(
    prepared: Any, proxy: FaultyProxy, start: Start, script: Callable[[str], Path], tmp_path: Path
) -> None:
    large = [1 << 20] * 3
    readers = start(script(READERS), URL, tmp_path / "cache", prepared.folder, 1, *large, **endpoint_variables())
    readers.wait()
    assert_says(readers, *["right"] * 3)
    for shard in prepared.card.splits["train"].shards:
        assert proxy.count(shard.name) <= 1


def test_threads_read_and_fetch_through_one_source(
    smallest: int, open_copy: Callable[..., MdsSource], prepared: Any, tmp_path: Path
) -> None:
    """As a thread that fetches ahead of the reader does, in a cache that holds next to nothing."""
    source = open_copy(smallest)

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(30):
            start = draw.randrange(source.num_tokens - 200)
            if seed % 2:
                source.fetch(start, 200)
            else:
                assert source.read(start, 200)[0].tolist() == prepared.train.tokens[start : start + 200]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert_whole(tmp_path / "cache")


# ---- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"file systems cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_shared_out_and_then_named(prepared: Any, small_disk: Path) -> None:
    """The bound allows more than the disk has; first old shards make room, then nothing can."""
    source = MdsSource(prepared.folder.as_uri(), "train", small_disk / "cache", 1 << 30, QUICK)
    total = sum(-(-shard.size_bytes // 4096) * 4096 for shard in prepared.card.splits["train"].shards)
    assert total > 40 * 1024, "the disk has to be too small for all"
    for _ in range(2):
        assert source.read(0, source.num_tokens)[0].tolist() == prepared.train.tokens

    fill_disk(small_disk / "foreign")
    assert source.read(0, source.num_tokens)[0].tolist() == prepared.train.tokens

    for path in objects(small_disk / "cache"):
        path.unlink()
    fill_disk(small_disk / "foreign")
    with pytest.raises(DataError, match=rf"the disk of {small_disk}/cache is full \(\d+ bytes free, \d+ needed"):
        source.read(0, source.num_tokens)
    (small_disk / "foreign").unlink()
    assert source.read(0, source.num_tokens)[0].tolist() == prepared.train.tokens
    assert_whole(small_disk / "cache")


# ---- damage in the cache


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"\xff" * len(content)])
def test_a_damaged_object_is_downloaded_again(
    damage: Callable[[bytes], bytes], prepared: Any, open_copy: Callable[..., MdsSource], tmp_path: Path
) -> None:
    source = open_copy()
    source.fetch(0, source.num_tokens)
    for path in objects(tmp_path / "cache"):
        path.write_bytes(damage(path.read_bytes()))
    assert source.read(0, source.num_tokens)[0].tolist() == prepared.train.tokens
    for path in objects(tmp_path / "cache"):
        if path.suffix == ".json":  # read at opening alone
            path.unlink()
    assert_whole(tmp_path / "cache")
    assert open_copy().read(0, 9)[0].tolist() == prepared.train.tokens[:9]


def test_a_damaged_index_in_the_cache_is_downloaded_again(
    prepared: Any, open_copy: Callable[..., MdsSource], tmp_path: Path
) -> None:
    open_copy()
    (index,) = objects(tmp_path / "cache")
    index.write_bytes(b" " * index.stat().st_size)
    assert open_copy().read(0, 9)[0].tolist() == prepared.train.tokens[:9]


def test_a_page_that_is_wrong_on_the_remote_too_is_refused(
    prepared: Any, open_copy: Callable[..., MdsSource], tmp_path: Path
) -> None:
    """As its card says, but not a page: there is no use in downloading it again."""
    folder = Path(shutil.copytree(prepared.folder, tmp_path / "copy"))
    shard = prepared.card.splits["train"].shards[1]
    content = b"\xff" * shard.size_bytes
    (folder / shard.name).write_bytes(content)
    card = (folder / "dataset.json").read_text()
    (folder / "dataset.json").write_text(card.replace(shard.sha256, hashlib.sha256(content).hexdigest()))
    source = open_copy(folder=folder)
    with pytest.raises(DataError, match=rf"^page 0 of {folder.as_uri()}/{shard.name} cannot be read"):
        source.read(0, source.num_tokens)


# ---- clean starts


def test_what_a_killed_download_left_is_removed_and_what_is_at_work_stays(
    prepared: Any, files: list[Any], tmp_path: Path
) -> None:
    cache = ShardCache(tmp_path)
    for name in ("100-1-dead", "100-2-unlocked", "100-3-alive"):
        (tmp_path / "incoming" / name).mkdir()
        (tmp_path / "incoming" / name / "file").write_bytes(bytes(100))
    (tmp_path / "incoming" / "100-1-dead" / "lock").touch()
    alive = take_lock(tmp_path / "incoming" / "100-3-alive" / "lock")
    ShardCache(tmp_path)
    assert [path.name for path in (tmp_path / "incoming").iterdir()] == ["100-3-alive"]
    assert alive is not None
    os.close(alive)
    place(cache, files[1], prepared.folder)
    assert_whole(tmp_path)


# ---- folders that cannot be


def test_a_cache_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=rf"the cache folder {tmp_path}/file cannot be used"):
        ShardCache(tmp_path / "file")


def test_a_default_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In /tmp anybody may have made it before."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ours = tmp_path / f"titans_data-{os.getuid()}"
    (tmp_path / "theirs").mkdir()
    ours.symlink_to(tmp_path / "theirs")
    with pytest.raises(DataError, match=rf"{ours} is not a folder of this user"):
        ShardCache()
    ours.unlink()
    assert ShardCache().folder == ours
