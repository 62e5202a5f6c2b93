"""What each process measures for the tables of checkpoint.py."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import shutil
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import titans_dist.megatron  # noqa: F401  # isort: skip  (quickens the imports below)
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica

from titans_dist.checkpoint.saver import Saver, SaveResult
from titans_dist.checkpoint.sharded import load
from titans_dist.checkpoint.store import Store
from titans_dist.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    ParallelConfig,
    TrainingConfig,
    validate,
)
from titans_dist.parallel.engine import Engine
from titans_dist.parallel.processes import maximum, processes

Measured = dict[str, list[float]]
WARMUP = 6
"""Steps before memory is measured: until then the allocator keeps more after each."""


@dataclasses.dataclass(frozen=True)
class Size:
    """Of the model that is saved, and of one step."""

    hidden: int
    vocabulary: int
    rows: int
    length: int


def model_config(size: Size) -> ModelConfig:
    """Attention beside a memory, in four blocks."""
    return ModelConfig(
        variant="mag",
        num_layers=4,
        hidden_size=size.hidden,
        num_heads=4,
        vocab_size=size.vocabulary,
        window=64,
        segment_length=64,
        memory=MemoryConfig(expansion=2, chunk_size=32),
    )


def run_ranks(work: str, world: int, size: Size, folder: Path, *args: Any) -> list[Measured]:
    """`work`, the name of a function here, in `world` new processes; what each of them returns."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mp.start_processes(_rank, (work, world, port, size, folder, args), nprocs=world, start_method="spawn")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def _rank(rank: int, work: str, world: int, port: int, size: Size, folder: Path, args: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    config = Config(
        run_dir=str(folder),
        model=model_config(size),
        parallel=ParallelConfig(data=world),
        data=DataConfig(format="synthetic", vocab_size=size.vocabulary, sequence_length=size.length),
        training=TrainingConfig(
            device="cpu", global_batch_size=size.rows, micro_batch_size=size.rows // world, steps=10_000
        ),
    )
    validate(config)
    with processes(config) as device:
        measured = globals()[work](Training(config, device), folder, *args)
    (folder / f"{rank}.json").write_text(json.dumps(measured))


class Training:
    """The engine, with the same random rows in every step."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.engine, self.device, self.steps = Engine(config, device), device, 0
        shape = config.training.micro_batch_size, config.data.sequence_length + 1
        self._batches = [{"tokens": torch.randint(config.model.vocab_size, shape)}]

    def step(self) -> None:
        """One optimizer step."""
        self.engine.step(self._batches)
        self.steps += 1

    def save(self, saver: Saver) -> None:
        """What training waits for when the state is saved."""
        saver.start(self.steps, self.engine.sharded_state(), {})

    def load(self, store: Store) -> None:
        """Continue from the newest checkpoint."""
        step = store.committed()[-1]
        self.engine.load(load(store, step, self.engine.sharded_state(is_loading=True)), step)


def stall(training: Training, folder: Path, rounds: int, plain: int) -> Measured:
    """Seconds of a step, of a blocking save, of what remains of it when it is asynchronous, and of steps beside that.

    The first round is apart: it takes the memory that later saves find.
    """
    found: Measured = defaultdict(list)
    savers = {name: _saver(folder / name, asynchronous=name == "stall") for name in ("blocking", "stall")}
    training.step()
    for number in range(rounds + 1):
        kind = "" if number else "first "
        for _ in range(plain):
            found["step"].append(_seconds(training.step))
        found[f"{kind}blocking"].append(_seconds(lambda: training.save(savers["blocking"])))
        _sound(savers["blocking"].wait())
        training.step()
        found[f"{kind}stall"].append(_seconds(lambda: training.save(savers["stall"])))
        beside, result = [], None
        while maximum([int(result is None)])[0]:
            beside.append(_seconds(training.step))
            result = result or savers["stall"].finished()
        if number:
            found["beside"] += beside
            found["steps"].append(len(beside))
            found["delay"].append(sum(beside))
            found["writing"].append(_sound(result).seconds)
    found["bytes"] = [_sound(result).bytes]
    for saver in savers.values():
        saver.close()
    return found


def speed(training: Training, folder: Path, rounds: int) -> Measured:
    """Seconds of saves and loads of the same bytes, in turns; `bytes` are those of all ranks."""
    rank, engine = dist.get_rank(), training.engine
    own, common, raw = (folder / name for name in ("torch", "megatron", "raw"))
    saver = _saver(folder / "titans_dist", asynchronous=False)
    training.step()
    training.save(saver)
    total = _sound(saver.wait()).bytes
    buffer = bytearray(os.urandom(max(1, _written(saver.store, rank))))

    def plain_save() -> None:
        with own.with_name(f"torch-{rank}").open("wb") as stream:
            torch.save(_own_tensors(engine.sharded_state()), stream)
            stream.flush()
            os.fsync(stream.fileno())

    def raw_save() -> None:
        with raw.with_name(f"raw-{rank}").open("wb", buffering=0) as stream:
            _all_of(stream.write, buffer)
            os.fsync(stream.fileno())

    def raw_load() -> None:
        with raw.with_name(f"raw-{rank}").open("rb", buffering=0) as stream:
            _all_of(stream.readinto, buffer)

    def plain_load() -> None:
        torch.load(own.with_name(f"torch-{rank}"), weights_only=True)

    def their_load() -> None:
        dist_checkpointing.load(engine.sharded_state(is_loading=True), str(common))

    saves: dict[str, Callable[[], object]] = {
        "raw": raw_save,
        "titans_dist": lambda: (training.save(saver), _sound(saver.wait())),
        "torch": plain_save,
        "megatron": lambda: dist_checkpointing.save(engine.sharded_state(), str(common)),
    }
    loads = {"raw": raw_load, "titans_dist": lambda: training.load(saver.store), "torch": plain_load,
             "megatron": their_load}  # fmt: skip
    found: Measured = {"bytes": [total]}
    for number in range(rounds + 1):
        training.step()
        if rank == 0:
            shutil.rmtree(common, ignore_errors=True)
            common.mkdir()
        for name, call in saves.items():
            _record(found, f"save {name}", call, number)
        for name, call in loads.items():
            _forget(folder)
            _record(found, f"load {name}", call, number)
    saver.close()
    return found


def memory(training: Training, folder: Path, asynchronous: bool, saves: int) -> Measured:
    """Largest resident bytes over those before, in each save and in a load, and the bytes that this rank writes."""
    saver = _saver(folder / "checkpoints", asynchronous)
    for _ in range(WARMUP):
        training.step()
    dist.barrier()
    before, peaks = _resident(), []
    for number in range(saves):
        if number:
            training.step()
            _resident()  # what the step has freed is given back, or its peak would be taken for the save's
        _forget_peak()
        training.save(saver)
        _sound(saver.wait())
        peaks.append(_status("VmHWM") - before)
        dist.barrier()
    written = _written(saver.store, dist.get_rank())
    saver.close()
    before = _resident()
    _forget_peak()
    training.load(saver.store)
    return {"saves": peaks, "load": [_status("VmHWM") - before], "written": [written]}


def _saver(folder: Path, asynchronous: bool) -> Saver:
    return Saver(Store(folder), CheckpointConfig(keep=2, asynchronous=asynchronous, retries=0))


def _sound(result: SaveResult | None) -> SaveResult:
    if result is None or result.error is not None:
        raise RuntimeError("no save was under way" if result is None else result.error)
    return result


def _seconds(call: Callable[[], object]) -> float:
    """Until all ranks are through with it."""
    dist.barrier()
    start = time.perf_counter()
    call()
    dist.barrier()
    return time.perf_counter() - start


def _record(found: Measured, name: str, call: Callable[[], object], number: int) -> None:
    """Round 0 does not count; what fails there is left out from then on."""
    if number and name not in found:
        return
    try:
        seconds = _seconds(call)
    except Exception:
        if number or "megatron" not in name:
            raise
        return
    times = found.setdefault(name, [])
    if number:
        times.append(seconds)


def _own_tensors(sharded_state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What this rank writes of a state, by name and place."""
    found: Iterator[Any] = (value for value in nested_values(sharded_state) if isinstance(value, ShardedTensor))
    return {f"{x.key} {x.global_offset}": x.data for x in found if is_main_replica(x.replica_id)}


def _written(store: Store, rank: int) -> int:
    """Bytes of the file of this rank in the newest checkpoint."""
    files = store.manifest(store.committed()[-1])["files"]
    return sum(entry["size"] for name, entry in files.items() if name.startswith(f"__{rank}_"))


def _all_of(move: Callable[[memoryview], int | None], buffer: bytearray) -> None:
    view = memoryview(buffer)
    while view:
        view = view[move(view) or 0 :]


def _forget(folder: Path) -> None:
    """Let the system drop what it remembers of all files, so that they are read from the disk."""
    dist.barrier()
    if dist.get_rank() == 0:
        for path in folder.rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)  # what is not on the disk cannot be dropped
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def _resident() -> int:
    """Bytes that this process occupies, once what it has freed is given back to the system.

    Also what steps have left in cycles, which Python frees at some time or other.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _forget_peak() -> None:
    """VmHWM is VmRSS again."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
