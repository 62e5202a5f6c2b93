"""`titans-dist drill`: train at a small size while faults come, and compare with a run that nothing disturbed.

Most faults are injected by the workers themselves, at exact steps (`titans_dist.training.faults`); this process kills
the whole job, damages checkpoints and sends signals, as a machine, a disk and a scheduler would, and starts the job
again as a scheduler would.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from titans_dist.checkpoint.store import Store
from titans_dist.config import Config, Interrupted, UserError
from titans_dist.config.layout import world_size
from titans_dist.config.variables import FAULTS
from titans_dist.tracking import losses, read_metrics
from titans_launch import local, names, tables
from titans_launch.processes import Child

SMALL = {
    "data": "synthetic",
    "model.vocab_size": "512",
    "model.num_layers": "2",
    "model.hidden_size": "32",
    "model.num_heads": "4",
    "model.window": "16",
    "model.memory.chunk_size": "16",
    "data.vocab_size": "512",
    "data.sequence_length": "32",
    "data.synthetic_tokens": "1000000",
    "training.global_batch_size": "8",
    "training.micro_batch_size": "2",
    "training.log_interval": "50",
    "checkpoint.interval": "3",
    "checkpoint.retries": "1",
    "cluster.timeout_s": "10",
}
"""What is not on the command line of the drill."""
GAP = 5
"""Steps per fault; a fault comes at a random one of them."""
LONGEST_DELAY_S = 0.4
"""A kill or signal comes so long after the beginning of its step: inside it, between steps, or in a save."""
OUTSIDE = ("kill everything", "terminate", "damage a checkpoint")
"""What this process does to the job."""
KINDS = ("kill", "kill everything", "terminate", "full disk", "damage a checkpoint", "nan", "slow", "hang")
RECOVERY_TIMEOUT_S = 300


@dataclasses.dataclass(frozen=True)
class Fault:
    """One thing that goes wrong."""

    id: int
    kind: str
    step: int
    rank: int
    seconds: float
    """Before it comes, or how long it lasts."""
    steps: int = 4
    """How long a disk stays full: longer than from one checkpoint to the next."""


@dataclasses.dataclass
class Tally:
    """What has happened to the disturbed run."""

    starts: int = 0
    codes: Counter[int] = dataclasses.field(default_factory=Counter)
    """How often the job ended with which exit code."""
    happened: set[int] = dataclasses.field(default_factory=set)


def run(config: Config) -> int:
    """Undisturbed run, disturbed run, verdict: 0 if they are the same, 1 otherwise."""
    folder, drill = Path(config.run_dir), config.drill
    began, number = time.monotonic(), 0
    while True:
        seed = drill.seed + number
        if code := _round(folder / f"seed-{seed}", world_size(config.parallel), drill.faults, seed):
            return code
        number += 1
        if drill.hours is None or time.monotonic() - began >= 3600 * drill.hours:
            return 0


def schedule(count: int, seed: int, world: int) -> list[Fault]:
    """`count` faults, each kind as often as the others, at random steps, ranks and moments."""
    chance = random.Random(seed)
    # A full disk of rank 0 would take the metrics that the verdict is made of.
    kinds = [kind for kind in KINDS if world > 1 or kind != "full disk"]
    order: list[str] = []
    while len(order) < count:
        order += chance.sample(kinds, len(kinds))
    return [
        Fault(
            id=number,
            kind=kind,
            step=2 + GAP * number + chance.randrange(GAP),
            rank=chance.randrange(1, world) if kind == "full disk" else chance.randrange(world),
            seconds=chance.uniform(0, LONGEST_DELAY_S) + (1 if kind == "slow" else 0),
        )
        for number, kind in enumerate(order[:count])
    ]


def _round(folder: Path, world: int, count: int, seed: int) -> int:
    faults, steps = schedule(count, seed, world), 2 + GAP * (count + 1)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"training {steps} steps on {world} processes, undisturbed", flush=True)
    with Child(_command(folder / "undisturbed", steps, 0), stdout=_log(folder), stderr=_log(folder)) as child:
        if code := child.wait():
            raise UserError(f"the undisturbed run ended with {code}, so there is nothing to compare with; see {folder}")
    print(f"training them again, with {count} faults (seed {seed})", flush=True)
    started, tally = time.monotonic(), Tally()
    _disturb(folder, faults, steps, tally)
    return _verdict(folder, faults, steps, tally, time.monotonic() - started)


def _command(run_dir: Path, steps: int, restarts: int) -> list[str]:
    given = local.job_arguments(run_dir)
    keys = {argument.lstrip("+").partition("=")[0] for argument in given}
    ours = SMALL | {"training.steps": str(steps), "cluster.max_restarts": str(restarts)}
    small = [f"{key}={value}" for key, value in ours.items() if key not in keys or key == "training.steps"]
    return [sys.executable, "-m", "titans_launch", "train", *given, *small, f"name={names.quote(run_dir.name)}"]


def _log(folder: Path) -> Any:
    return (folder / "console.log").open("ab")


def _disturb(folder: Path, faults: list[Fault], steps: int, tally: Tally) -> None:
    """Start the job again and again until it is done."""
    listed = folder / "faults.json"
    inside = [dataclasses.asdict(fault) for fault in faults if fault.kind not in OUTSIDE]
    listed.write_text(json.dumps(inside, indent=1))
    run_dir = folder / "disturbed"
    command = _command(run_dir, steps, len(faults) + 1)
    waiting = [fault for fault in faults if fault.kind in OUTSIDE]
    told: set[int] = set()
    while True:
        tally.starts += 1
        if tally.starts > 2 * len(faults) + 10:
            raise UserError(f"the job was started {tally.starts} times and is not done; see {run_dir / 'logs'}")
        environment = os.environ | {FAULTS: str(listed.absolute())}
        with Child(command, env=environment, stdout=_log(folder), stderr=_log(folder)) as child:
            moved = time.monotonic(), 0
            while (code := child.wait(0.05)) is None:
                done = _last_step(run_dir)
                _tell(folder, faults, told, tally, len(faults))
                if done != moved[1]:
                    moved = time.monotonic(), done
                if time.monotonic() - moved[0] > RECOVERY_TIMEOUT_S:
                    raise UserError(f"the run stands at step {done} for {RECOVERY_TIMEOUT_S} s; see {run_dir / 'logs'}")
                if waiting and done + 1 >= waiting[0].step:
                    fault = waiting.pop(0)
                    time.sleep(fault.seconds)
                    _act(fault, child, run_dir)
                    tally.happened.add(fault.id)
            tally.codes[code] += 1
        if child.signalled:
            raise Interrupted(f"stopped; what was done so far is in {tables.place(folder)}")
        if code == 0:
            _tell(folder, faults, told, tally, len(faults))
            return


def _act(fault: Fault, child: Child, run_dir: Path) -> None:
    if fault.kind == "terminate":
        if child.process is not None and child.process.poll() is None:
            child.process.terminate()
        return
    child.kill()
    if fault.kind == "damage a checkpoint":
        damage(Store(run_dir / "checkpoints"), fault.id)


def damage(store: Store, seed: int) -> None:
    """Flip one byte in one file of the newest checkpoint, if there is an older one to fall back on."""
    steps = store.committed()
    if len(steps) < 2:
        return
    chance = random.Random(seed)
    files = sorted(path for path in store.folder(steps[-1]).iterdir() if path.stat().st_size > 0)
    path = chance.choice(files)
    with path.open("r+b") as file:
        file.seek(chance.randrange(path.stat().st_size))
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1 << chance.randrange(8)]))


def _last_step(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return 0
    rows = read_metrics(path)
    return next((row["step"] for row in reversed(rows) if row["kind"] == "train"), 0)


def _tell(folder: Path, faults: list[Fault], told: set[int], tally: Tally, count: int) -> None:
    """A line for each fault that has come since."""
    tally.happened |= {int(path.name.split("-")[1]) for path in folder.glob("fault-*-rank*")}
    for fault in faults:
        if fault.id in tally.happened - told:
            told.add(fault.id)
            who = "" if fault.kind in OUTSIDE else f" | rank {fault.rank}"
            print(f"fault {len(told)}/{count} | step {fault.step} | {fault.kind}{who}", flush=True)


def _verdict(folder: Path, faults: list[Fault], steps: int, tally: Tally, seconds: float) -> int:
    wanted, found = (losses(folder / name / "metrics.jsonl") for name in ("undisturbed", "disturbed"))
    rows = read_metrics(folder / "disturbed" / "metrics.jsonl")
    trained = [row["step"] for row in rows if row["kind"] == "train"]
    events = Counter(row["name"] for row in rows if row["kind"] == "event")
    differing = [step for step in range(1, steps + 1) if wanted.get(step) != found.get(step)]
    gaps = list(_gaps(rows))
    kinds = Counter(fault.kind for fault in faults if fault.id in tally.happened)
    missing = [fault for fault in faults if fault.id not in tally.happened]
    tables.show(
        f"drill: {len(tally.happened)} faults in {seconds:,.0f} s",
        [
            *((kind, f"{kinds[kind]} times") for kind in KINDS if kinds[kind]),
            ("job started", f"{tally.starts} times; exit codes {_codes(tally.codes)}"),
            ("resumed", f"{events['resume']} times from a checkpoint"),
            ("failed saves", f"{events['save_failed']}, reported, and training went on"),
            ("steps redone", f"{events['redone']} that were not finite"),
            ("steps computed again", f"{len(trained) - len(set(trained))} after a resume"),
            ("steps lost", f"{steps - len(set(trained) & set(range(1, steps + 1)))}"),
            ("steps out of order", f"{len(gaps)}"),
            ("losses", f"{steps - len(differing)} of {steps} bit for bit those of the undisturbed run"),
        ],
    )
    if differing or gaps or missing:
        what = [
            f"the loss of step {differing[0]} differs" if differing else "",
            f"step {gaps[0]} came out of order" if gaps else "",
            f"{len(missing)} faults never came" if missing else "",
        ]
        raise UserError(f"the drill failed: {', '.join(filter(None, what))}; both runs are in {tables.place(folder)}")
    return 0


def _codes(codes: Counter[int]) -> str:
    return ", ".join(f"{code} ({count} times)" for code, count in sorted(codes.items()))


def _gaps(rows: list[dict[str, Any]]) -> Iterator[int]:
    """Steps that do not follow the one before, or the checkpoint that was resumed."""
    last = 0
    for row in rows:
        if row["kind"] == "event" and row["name"] == "resume":
            last = row["step"]
        elif row["kind"] == "train":
            if row["step"] not in (last + 1, 1):  # a start without any checkpoint begins at 1 and writes no event
                yield row["step"]
            last = row["step"]
