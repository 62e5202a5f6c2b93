"""The processes of a run: start, device, groups, agreement."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from titans_dist.config import Config, ConfigError
from titans_dist.parallel import cpu


@contextmanager
def processes(config: Config) -> Iterator[torch.device]:
    """Join the other processes of this run (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) for the block.

    Makes megatron-core's groups for the layout and yields this process's device. Raises ConfigError where the
    number of processes does not fit the layout or the device is not there.
    """
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0"))
    check_world(config, world)
    device = choose_device(config.training.device, local)
    if device.type == "cpu":
        torch.set_num_threads(config.cluster.threads)
    else:
        torch.cuda.set_device(device)
    cpu.install()
    from megatron.core import parallel_state

    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(seconds=config.cluster.timeout_s)
    )
    try:
        parallel_state.initialize_model_parallel(config.parallel.tensor)
        yield device
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def check_world(config: Config, world: int) -> int:
    """The data-parallel size of `world` processes. Raises ConfigError where the layout does not fill them exactly."""
    tensor, data = config.parallel.tensor, config.parallel.data
    copies = world // tensor
    if tensor * copies != world or (data is not None and data != copies):
        asked = f"parallel.tensor={tensor}" + (f" x parallel.data={data}" if data is not None else "")
        fit = f"parallel.data={copies}" if world % tensor == 0 else f"a multiple of {tensor} processes"
        raise ConfigError(f"{world} processes do not fit {asked}; use {fit}")
    rows = config.training.micro_batch_size * copies
    if config.training.global_batch_size % rows:
        raise ConfigError(
            f"training.global_batch_size={config.training.global_batch_size} is no multiple of micro_batch_size x "
            f"data-parallel size = {rows}; change one of them"
        )
    return copies


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """auto | cuda | cpu -> this process's device."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("training.device=cuda but torch sees no GPU; use training.device=auto or cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local_rank} of this machine has no GPU of its own; there are {torch.cuda.device_count()}, "
            "start one process per GPU"
        )
    return torch.device("cuda", local_rank)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on any rank: the agreement before anything that all ranks must do together."""
    value = torch.tensor(int(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())
