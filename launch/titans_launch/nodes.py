"""One node of several: what the environment says of it, in torchrun's own names.

A scheduler starts the same `titans-dist` once on each node, with PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR and
PET_MASTER_PORT, and PET_RDZV_ID as the name of this start of the job. Each then starts its own processes, all of which
meet at the address of node 0. No node is started again alone: that is for who started all of them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

from titans_dist.config import Config, ConfigError
from titans_dist.config.layout import world_size
from titans_dist.config.machines import LARGEST_PORT

MEETING_TIMEOUT_S = 3600
"""Seconds for which nodes wait for the first one: it may still prepare data, or pull its image."""

_PREFIX = "PET_"


@dataclasses.dataclass(frozen=True)
class Node:
    """One machine of a job on several."""

    rank: int
    count: int
    address: str
    """Of node 0."""
    port: int
    name: str
    """Of the start of the job, the same on all nodes."""
    asked: int | None
    """Processes on each node, where the environment has a number."""

    def processes(self, config: Config) -> int:
        """Processes of this node, as many as of each other."""
        cluster = config.cluster
        on_cpus = max(1, world_size(config.parallel) // self.count)
        return self.asked or cluster.processes_per_node or cluster.gpus_per_node or on_cpus

    def torchrun(self, processes: int) -> list[str]:
        """The flags of torchrun that make its processes meet those of the other nodes."""
        return [
            *("--nnodes", str(self.count), "--node-rank", str(self.rank), "--nproc-per-node", str(processes)),
            *("--master-addr", self.address, "--master-port", str(self.port)),
            *("--rdzv-id", self.name, "--rdzv-conf", f"timeout={MEETING_TIMEOUT_S}", "--max-restarts", "0"),
        ]


def named() -> bool:
    """Whether the environment makes this process the launcher of a node: not a worker, whoever started it."""
    return "PET_NODE_RANK" in os.environ and "RANK" not in os.environ


def this_node() -> Node | None:
    """This node of several; None alone. Raises ConfigError where the environment does not say where the others are."""
    if not named():
        return None
    count, rank = _number("PET_NNODES", 1, None), _number("PET_NODE_RANK", 0, None)
    if rank >= count:
        raise ConfigError(f"PET_NODE_RANK={rank} is no node of PET_NNODES={count}; they are counted from 0")
    if count == 1:
        return None
    if not (address := os.environ.get("PET_MASTER_ADDR")):
        raise ConfigError(
            f"this is node {rank} of {count}, but PET_MASTER_ADDR is not set; export the address of the first node"
        )
    each = os.environ.get("PET_NPROC_PER_NODE", "")
    return Node(
        rank=rank,
        count=count,
        address=address,
        port=_number("PET_MASTER_PORT", 1, LARGEST_PORT - 1, default="29500"),
        name=os.environ.get("PET_RDZV_ID") or os.environ.get("SLURM_JOB_ID") or "none",
        asked=_number("PET_NPROC_PER_NODE", 1, None) if each.isdigit() else None,  # else such as auto
    )


def without_flags(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without the variables that torchrun takes for flags: it gets what it needs on its command line."""
    return {name: value for name, value in environment.items() if not name.startswith(_PREFIX)}


def _number(name: str, low: int, high: int | None, default: str = "") -> int:
    text = os.environ.get(name, default)
    if not text.isdigit() or int(text) < low or (high is not None and int(text) > high):
        legal = f"from {low} to {high}" if high else f">= {low}"
        raise ConfigError(
            f"{name}={text or 'nothing'} is no whole number {legal}; give each node its own PET_NODE_RANK "
            "and all of them the same PET_NNODES, PET_MASTER_ADDR and PET_MASTER_PORT"
        )
    return int(text)
