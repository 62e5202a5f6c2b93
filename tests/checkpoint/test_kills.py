"""kill -9 at random moments around saves, and starts that overlap: the newest checkpoint is always there, and whole."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import statistics
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.checkpoint.test_sharded import state
from tests.distributed import prepare_parent
from titans_dist.checkpoint import lease as lease_module
from titans_dist.checkpoint.lease import Lease
from titans_dist.checkpoint.saver import Saver
from titans_dist.checkpoint.sharded import load, newest_valid, on_rank_0
from titans_dist.checkpoint.store import Store
from titans_dist.config.run import CheckpointConfig

KILLS = 200
WORLD = 2
KEEP = 2
PERMANENT = 7
"""Every so many steps a checkpoint is permanent."""

save_times: list[float] = []


def train_for_ever(rank: int, root: Path, meeting: Path, sender: Connection, restarts: int) -> None:
    """One start of a run: go on from the newest checkpoint, which must hold what its step had, and save each step."""
    os.environ.update(GLOO_SOCKET_IFNAME="lo", SLURM_JOB_ID="7", SLURM_RESTART_COUNT=str(restarts))
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD)
    store = Store(root)

    def acquire() -> None:
        store.lease = Lease.acquire(root)

    on_rank_0(acquire)
    step = newest_valid(store, lambda sentence: None) or 0
    if step > 0:
        loaded = load(store, step, state(rank, WORLD, -1))
        if not torch.equal(loaded["split"], state(rank, WORLD, step)["split"].data) or store.meta(step)["step"] != step:
            sender.send(("wrong content", step))
    sender.send(("resumed", step))
    saver = Saver(store, CheckpointConfig(keep=KEEP, retries=0))
    while True:
        step += 1
        sender.send(("starts", step))
        saver.start(step, state(rank, WORLD, step), {"step": step}, permanent=step % PERMANENT == 0)
        result = saver.wait()
        assert result is not None
        if result.is_fenced:
            sender.send(("fenced off", step))
            return
        sender.send(("saved", step) if result.error is None else (result.error, step))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_at_random_moments_around_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank is killed, or both; the rest of a start ends with it, as with every launcher."""
    monkeypatch.setattr(lease_module, "SETTLE_S", 0.01)
    prepare_parent()
    dice, root = random.Random(0), tmp_path / "checkpoints"
    saved: set[int] = set()
    newest, inside_saves, leftovers = 0, 0, 0
    for number in range(KILLS):
        ranks = started(root, tmp_path / f"meeting{number}")
        heard = listen_and_kill(ranks, dice)
        said = [message for message, _ in heard]
        told = set(said) - {"resumed", "starts", "saved"}
        assert all("has lost the other ranks" in message for message in told), told
        inside_saves += said[-1] == "starts" or bool(told)
        saved |= {step for message, step in heard if message == "saved"}
        store = Store(root)
        before, newest = newest, store.newest_valid(lambda sentence: None) or 0
        assert newest >= before and newest >= max(saved, default=0), "it went back"
        # The kill may fall between the commit and the message about it, but there is no commit without a start.
        assert newest <= max(step for message, step in heard if message in ("starts", "resumed"))
        whole = store.committed()
        for step in whole:
            store.verify(step)
        must_stay = set(sorted(saved | set(whole))[-KEEP:]) | {step for step in saved if step % PERMANENT == 0}
        assert must_stay <= set(whole)
        leftovers += bool(store.leftovers())
    assert newest > KILLS / 4 and inside_saves > KILLS / 4 and leftovers > 5, "the kills must fall into saves"


def test_a_later_start_takes_over_while_the_earlier_one_writes_the_same_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "SETTLE_S", 0.01)
    prepare_parent()
    root = tmp_path / "checkpoints"
    earlier = None
    for number in range(6):
        ranks = started(root, tmp_path / f"meeting{number}", restarts=number)
        said = said_until("resumed", ranks)
        assert [message for message, _ in said] == ["resumed"]
        resumed = said[0][1]
        if earlier is not None:
            end = said_until("fenced off", earlier)
            assert {message for message, _ in end} <= {"starts", "saved", "fenced off"}
            assert max((step for message, step in end if message == "saved"), default=0) <= resumed
        assert said_until("saved", ranks)[-1] == ("saved", resumed + 1)
        store = Store(root)
        for step in store.committed():
            store.verify(step)
        earlier = ranks
    assert earlier is not None
    for process, _ in earlier:
        process.kill()
        process.join()


def said_until(last: str, ranks: list[tuple[BaseProcess, Connection]]) -> list[tuple[str, int]]:
    """What rank 0 says, up to a certain message."""
    heard: list[tuple[str, int]] = []
    while not heard or heard[-1][0] != last:
        assert ranks[0][1].poll(60), f"after {heard} nothing was heard"
        heard.append(ranks[0][1].recv())
    return heard


def started(root: Path, meeting: Path, restarts: int = 0) -> list[tuple[BaseProcess, Connection]]:
    context, ranks = multiprocessing.get_context("fork"), []
    for rank in range(WORLD):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=train_for_ever, args=(rank, root, meeting, sender, restarts), daemon=True)
        process.start()
        sender.close()
        ranks.append((process, receiver))
    return ranks


def listen_and_kill(ranks: list[tuple[BaseProcess, Connection]], dice: random.Random) -> list[tuple[str, int]]:
    """Kill after up to two whole saves, at a moment of the next one; what rank 0 has said."""
    receiver = ranks[0][1]
    heard: list[tuple[str, int]] = []
    saves = dice.randrange(3)
    while sum(message == "starts" for message, _ in heard) <= saves:
        heard.append(receiver.recv())
        if heard[-1][0] == "starts":
            began = time.monotonic()
        elif heard[-1][0] == "saved":
            save_times.append(time.monotonic() - began)
    moment = dice.random() * (statistics.median(save_times) if save_times else 0.1)
    signal_after(ranks, dice.choice(([0], [1], [0, 1])), moment)
    signal_after(ranks, range(len(ranks)), dice.random() * 0.02)
    for process, _ in ranks:
        process.join()
    with contextlib.suppress(EOFError):
        while True:
            heard.append(receiver.recv())
    for _, connection in ranks:
        connection.close()
    return heard


def signal_after(ranks: list[tuple[BaseProcess, Connection]], victims: range | list[int], seconds: float) -> None:
    ranks[victims[0]][0].join(timeout=seconds)
    for victim in victims:
        pid = ranks[victim][0].pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
