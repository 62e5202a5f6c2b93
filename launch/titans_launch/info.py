"""`titans-dist info`: versions, devices, layout and parameters, without building or training anything."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib import metadata

import psutil
from rich.table import Table

from titans_dist.config import Config, MemoryConfig, ModelConfig
from titans_dist.config.layout import context_mode, describe_layout, parts, world_size
from titans_dist.config.sizes import parameter_count
from titans_launch import tables

PACKAGES = (
    "titans-dist",
    "torch",
    "triton",
    "megatron-core",
    "deepspeed",
    "mosaicml-streaming",
    "ray",
    "wandb",
    "hydra-core",
)


def run(config: Config) -> None:
    """Print everything, the slow part (which imports torch) last."""
    tables.show("versions", [("python", platform.python_version()), *((name, version(name)) for name in PACKAGES)])
    tables.show("devices", devices())
    tables.show("model", model(config.model))
    tables.show("layout", layout(config))
    show_parameters(config)


def version(package: str) -> str:
    """The installed version of a package, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def devices() -> list[tuple[str, str]]:
    """The processors of this machine; GPUs as the driver lists them."""
    cores, memory = psutil.cpu_count(logical=False) or psutil.cpu_count(), psutil.virtual_memory().total / 2**30
    rows = [("cpu", f"{cores} cores, {memory:.0f} GiB of memory")]
    if shutil.which("nvidia-smi") is None:
        return [*rows, ("gpu", "none (no nvidia-smi)")]
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return [*rows, ("gpu", f"unknown ({error})")]
    return [*rows, *((f"gpu {i}", line) for i, line in enumerate(listed.splitlines()))]


def model(config: ModelConfig) -> list[tuple[str, str]]:
    """What the model is, and how large."""
    count = parameter_count(config)
    grouped = f", attention with {config.kv_heads} for keys and values" if config.kv_heads < config.num_heads else ""
    asked = f" ({count / config.parameters - 1:+.1%} of model.parameters)" if config.parameters else ""
    return [
        ("variant", config.variant),
        ("blocks", f"{config.num_layers} of width {config.hidden_size}, MLP {config.mlp_size}"),
        ("heads", f"{config.num_heads} of {config.head_dim}{grouped}"),
        ("memory", memory(config.memory) if config.has_memory else "none"),
        ("parameters", f"{count:,}{asked}"),
    ]


def memory(config: MemoryConfig) -> str:
    """The memory in one line, such as `titans: depth 2, l2 loss, l2 retention, momentum, chunks of 64`."""
    depth, loss, retention = (config.choice(name) for name in ("depth", "bias", "retention"))
    words = [f"{config.preset}: depth {depth}", f"{loss} loss", f"{retention} retention"]
    if config.choice("momentum"):
        words.append("momentum")
    if config.channel_wise:
        words.append("gates per channel")
    words.append(f"chunks of {config.chunk_size}")
    if config.is_tnt:
        words.append(f"TNT with shards of {config.shard_size} and global chunks of {config.global_chunk_size}")
    return ", ".join(words)


def layout(config: Config) -> list[tuple[str, str]]:
    """How a run of this configuration is split over processes."""
    parallel, data, training = config.parallel, config.parallel.data or 1, config.training
    tokens = training.global_batch_size * config.data.sequence_length
    micro = training.global_batch_size // (training.micro_batch_size * data)
    free = "" if config.parallel.data else " (parallel.data unset: as many as are launched)"
    return [
        ("run", tables.place(config.run_dir)),
        ("processes", f"{world_size(parallel)} = {describe_layout(parallel, data)}{free}"),
        *stages(config),
        ("batch", f"{training.global_batch_size} sequences = {tokens:,} tokens, {micro} micro-batch(es) per copy"),
        ("steps", f"{training.steps:,}, {training.steps * tokens:,} tokens in all"),
    ]


def stages(config: Config) -> list[tuple[str, str]]:
    """What each pipeline stage holds, and how memories cross the shares of a sequence; where there are any."""
    parallel, rows = config.parallel, []
    if parallel.pipeline > 1:
        every = parts(parallel, config.model.num_layers)
        named = [
            " and ".join(f"{part.start} to {part.stop - 1}" for part in every[stage :: parallel.pipeline])
            for stage in range(parallel.pipeline)
        ]
        rows.append(("blocks of each stage", "; ".join(named)))
    if parallel.context > 1:
        share = config.data.sequence_length // parallel.context
        crossing = f", memories by {context_mode(config)}" if config.model.has_memory else ""
        rows.append(("each sequence", f"{parallel.context} shares of {share} tokens{crossing}"))
    return rows


def show_parameters(config: Config) -> None:
    """Print one row per kind of parameter, and the total."""
    from titans_dist.model import describe

    rows = describe(config.model, config.parallel.tensor)
    table = Table(title="parameters", title_justify="left", show_footer=True)
    table.add_column("module", "total", overflow="fold")
    table.add_column("shape", no_wrap=True)
    table.add_column("parameters", f"{sum(count for _, _, count, _ in rows):,}", justify="right")
    table.add_column(f"over {config.parallel.tensor} tensor-parallel processes")
    for name, shape, count, split in rows:
        table.add_row(name, shape, f"{count:,}", split)
    tables.console().print(table)
