"""Launch configurations: the block of hidden units, warps and pipeline stages of each kernel, per GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Launch:
    """block: hidden units at a time (depth 2); warps and stages as Triton has them."""

    block: int
    warps: int
    stages: int = 1


KERNELS = ("write", "read", "read_backward", "write_backward")
DEFAULT = Launch(block=32, warps=8)

# (kernel, padded head dim, padded chunk): what compiles for sm_90 without spills, see `python -m titans_kernels.tune`.
TABLES: dict[str, dict[tuple[str, int, int], Launch]] = {"sm_90": {}}


def launch_of(kernel: str, dim: int, chunk: int, device: torch.device) -> Launch:
    """The configuration for heads padded to `dim` and chunks padded to `chunk` on this device."""
    return TABLES[_architecture(device)].get((kernel, dim, chunk), DEFAULT)


@functools.cache
def _architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return "sm_90"
    major, minor = torch.cuda.get_device_capability(device)
    name = f"sm_{major}{minor}"
    return name if name in TABLES else "sm_90"
