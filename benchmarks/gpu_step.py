"""Whole training steps of 340M models on one GPU, by the training engine: forward, loss, backward, clipping, AdamW."""

from __future__ import annotations

import os
import socket
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from gpu_machine import ROOT, Row, Settings, in_processes, why
from gpu_operator import ratio, target

from titans_dist.config import Config, DataConfig, ModelConfig, TrainingConfig, validate

VARIANTS = ("lmm", "mag", "transformer", "swa")
BASE = "transformer"
WARMUP, COUNTED = 2, 3
TINY = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "parameters": None, "vocab_size": 64, "window": 8}
LEAST = {4096: 0.8, 16384: 1.0}
"""Tokens per second a model with a memory should reach as a multiple of the Transformer's, by length of context."""


@dataclass(frozen=True)
class Run:
    """One model at one length; `most_tokens` per step, or half of it, and so on, until it fits."""

    variant: str
    length: int
    most_tokens: int
    backend: str
    device: str
    tiny: bool


def steps(settings: Settings) -> list[Row]:
    """A row per length and model, each measured in a process of its own."""
    lengths = (32, 64) if settings.tiny else tuple(LEAST)
    most = 128 if settings.tiny else 65536
    todo = [
        Run(variant, length, most, settings.backend, settings.device, settings.tiny)
        for length in lengths
        for variant in VARIANTS
    ]
    workers = 0 if settings.device == "cpu" else 1
    found = {one: row for one, row in in_processes(measure, todo, workers, settings.seconds_left)}
    return [{"model": one.variant, "length": one.length, **found[one]} for one in todo]


def targets(rows: list[Row]) -> list[Row]:
    """Each model with a memory against the Transformer with full attention."""
    found = []
    by_name = {(row["model"], row["length"]): row for row in rows}
    for length, least in zip(sorted({row["length"] for row in rows}), LEAST.values(), strict=True):
        for variant in ("lmm", "mag"):
            value = ratio(by_name[variant, length], by_name[BASE, length])
            found.append(target(f"step of {variant} / Transformer++, {length} tokens", value, least))
    return found


def measure(run: Run) -> Row:
    """Seconds of each counted step and the memory of the last."""
    from titans_dist.parallel.processes import processes

    config = configuration(run)
    validate(config)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    with processes(config) as device:
        return _measure(run, config, device)


def _measure(run: Run, config: Config, device: torch.device) -> Row:
    from titans_dist.parallel.engine import Engine

    engine = Engine(config, device)
    rows = max(1, run.most_tokens // run.length)
    while True:
        try:
            return _steps(engine, run, config, rows, device)
        except torch.OutOfMemoryError as error:
            if rows == 1:
                return {"error": why(error)}
        rows //= 2
        torch.cuda.empty_cache()


def _steps(engine: Any, run: Run, config: Config, rows: int, device: torch.device) -> Row:
    g = torch.Generator().manual_seed(0)
    is_gpu = device.type == "cuda"
    times, before, peak = [], 0, None
    for step in range(WARMUP + COUNTED):
        tokens = torch.randint(config.model.vocab_size, (rows, run.length + 1), generator=g)
        if is_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        engine.step([{"tokens": tokens}])
        if is_gpu:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        if step >= WARMUP:
            times.append(time.perf_counter() - start)
    count, seconds = rows * run.length, statistics.median(times)
    return {
        "tokens": count,
        "seconds": seconds,
        "times": times,
        "tokens_per_s": count / seconds,
        "peak_bytes": peak,
        "bytes_per_token": None if peak is None else (peak - before) / count,
    }


def configuration(run: Run) -> Config:
    """What `experiment=titans_340m variant=...` trains, from the same files, but for the data."""
    model = _group("model", "340m") | _group("variant", run.variant)["model"]
    memory = _group("memory", "titans") | {"backend": run.backend}
    if run.tiny:
        model, memory = model | TINY, memory | {"chunk_size": 8}
    rows = max(1, run.most_tokens // run.length)
    return Config(
        name="gpu",
        run_dir="",
        model=ModelConfig(**model, memory=memory),  # type: ignore[arg-type]
        data=DataConfig(format="synthetic", path="", vocab_size=model["vocab_size"], sequence_length=run.length),
        training=TrainingConfig(
            global_batch_size=rows,
            micro_batch_size=rows,
            precision="bfloat16" if run.device == "cuda" else "float32",
            device=run.device,
        ),
    )


def _group(group: str, name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "configs" / group / f"{name}.yaml").read_text())
