"""After kill -9 at whatever moment, the next start works at once."""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.caches import QUICK, URL, assert_says, assert_whole, next_line, objects
from tests.data.remotes import Fault, FaultyProxy, endpoint_variables
from titans_data import MdsSource
from titans_data.locks import take_lock

Start = Callable[..., "subprocess.Popen[str]"]

# For each line of input a run in a process group of its own: the workers of a DataLoader read without end.
# The line is the URL; arguments: cache, folder, cache_bytes, how workers are started.
RUNS = """
import os, random, sys
from torch.utils.data import DataLoader, Dataset
from titans_data import MdsSource
from titans_data._imports import import_streaming
from titans_data.remote import Retries

class Spans(Dataset):
    def __init__(self, source):
        self.source = source
    def __len__(self):
        return 1 << 30
    def __getitem__(self, index):
        start = random.Random(index).randrange(self.source.num_tokens - 100)
        return start, self.source.read(start, 100)[0]

def run(url):
    source = MdsSource(url, "train", cache, int(cache_bytes), Retries(4, 0.01, 5.0))
    for number, (start, tokens) in enumerate(DataLoader(
        Spans(source), batch_size=None, shuffle=False, num_workers=2, multiprocessing_context=method
    )):
        assert (tokens.numpy() == local.read(start, 100)[0]).all()
        if number in (0, 20):
            print("right", number, flush=True)

if __name__ == "__main__":
    cache, folder, cache_bytes, method = sys.argv[1:]
    local = MdsSource(folder)
    import_streaming()  # takes seconds: once, before the forks
    for url in sys.stdin:
        job = os.fork()
        if job == 0:
            os.setsid()
            run(url.strip())
            os._exit(1)
        print("job", job, flush=True)
        os.waitpid(job, 0)
        print("ended", flush=True)
"""

# A child that is forked while a lock is held, and outlives its parent.
FORKER = """
import os, sys, time
from pathlib import Path
from titans_data.locks import take_lock
take_lock(Path(sys.argv[1]))
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
time.sleep(0.3)
print(child, flush=True)
time.sleep(60)
"""


def test_a_forked_child_does_not_keep_the_locks_of_its_parent(
    start: Start, script: Callable[[str], Path], tmp_path: Path
) -> None:
    parent = start(script(FORKER), tmp_path / "lock")
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert take_lock(tmp_path / "lock", wait=False) is None
    parent.kill()
    parent.wait()
    os.kill(child, 0)
    assert take_lock(tmp_path / "lock", wait=False) is not None
    os.kill(child, signal.SIGKILL)


@pytest.fixture
def runs(
    prepared: Any, proxy: FaultyProxy, smallest: int, start: Start, script: Callable[[str], Path], tmp_path: Path
) -> Callable[[str], subprocess.Popen[str]]:
    """Start RUNS with S3 below a cache as small as may be."""

    def run(method: str) -> subprocess.Popen[str]:
        arguments = (script(RUNS), tmp_path / "cache", prepared.folder, smallest, method)
        return start(*arguments, **endpoint_variables())

    return run


def begin(server: subprocess.Popen[str], url: str) -> int:
    """Let RUNS start a run; the number of its process group."""
    assert server.stdin is not None
    server.stdin.write(f"{url}\n")
    server.stdin.flush()
    return int(next_line(server).removeprefix("job "))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_through_the_cache(method: str, runs: Callable[[str], subprocess.Popen[str]]) -> None:
    server = runs(method)
    job = begin(server, URL)
    try:
        assert_says(server, "right 0", "right 20")
    finally:
        os.killpg(job, signal.SIGKILL)


@pytest.mark.slow
def test_the_next_start_after_a_kill_works_at_once(
    prepared: Any, proxy: FaultyProxy, smallest: int, runs: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    """25 times: all processes of a run killed at a random moment, while it downloads and evicts all the time."""
    draw, cache = random.Random(5), tmp_path / "cache"
    before = streaming_leftovers()
    proxy.faults.append(Fault("shard", "hang", 2))
    server = runs("fork")
    for number in range(25):
        job = begin(server, URL if number % 3 == 0 else prepared.folder.as_uri())
        if draw.random() < 0.7:
            assert_says(server, "right 0")
        time.sleep(draw.random() * 0.5)
        os.killpg(job, signal.SIGKILL)
        while (line := next_line(server)) != "ended":
            assert line.startswith("right")
        for path in objects(cache) if cache.exists() else ():
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem
    proxy.faults.clear()
    source = MdsSource(URL, "train", cache, smallest, QUICK)
    assert source.read(0, source.num_tokens)[0].tolist() == prepared.train.tokens
    assert_whole(cache)
    assert streaming_leftovers() <= before


def streaming_leftovers() -> set[str]:
    """Names as streaming registers its readers in shared memory: six digits and what they are for."""
    return {path.name for path in Path("/dev/shm").iterdir() if re.match(r"\d{6}_", path.name)}
