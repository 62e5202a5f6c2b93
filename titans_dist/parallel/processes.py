"""The processes of a run: start, device, groups, agreement."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from titans_dist.config import Config, ConfigError, ParallelConfig
from titans_dist.config.layout import check_world
from titans_dist.parallel import cpu
from titans_dist.parallel.peers import check_versions, watched_peers

_control: dist.ProcessGroup | None = None
"""All ranks, over the CPU; None where that is the default group."""


@contextmanager
def processes(config: Config) -> Iterator[torch.device]:
    """Join the other processes of this run (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) for the block.

    Makes megatron-core's groups for the layout and yields this process's device. Raises ConfigError where the
    number of processes does not fit the layout or the device is not there; PeerError, naming the process and the
    collective, where another one is gone.
    """
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0"))
    check_world(config, world)
    device = choose_device(config.training.device, local)
    if device.type == "cpu":
        torch.set_num_threads(config.cluster.threads)
    else:
        torch.cuda.set_device(device)
    cpu.install()
    global _control
    timeout = datetime.timedelta(seconds=config.cluster.timeout_s)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    if device.type == "cuda":
        _control = dist.new_group(backend="gloo", timeout=timeout)
    try:
        with watched_peers(Path(config.run_dir), config.cluster.timeout_s):
            check_versions()
            make_groups(config.parallel, config.cluster.timeout_s)
            yield device
    finally:
        drop_groups()
        _control = None
        dist.destroy_process_group()


def make_groups(parallel: ParallelConfig, timeout_s: float = 600) -> None:
    """megatron-core's process groups for the layout, in its order: tensor, context, data, pipeline. Collective."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        context_parallel_size=parallel.context,
        distributed_timeout_minutes=timeout_s / 60,  # its own default is half an hour, whatever the job's is
    )


def drop_groups() -> None:
    """Undo `make_groups`."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


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


def maximum(values: list[int]) -> list[int]:
    """The largest of each of the values over all ranks: the agreement before what they must do together. Collective.

    It goes by the CPU, so that it does not wait for what a GPU is doing.
    """
    tensor = torch.tensor(values)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=_control)
    return [int(value) for value in tensor]
