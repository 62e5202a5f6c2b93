"""GPUs: the table of `hardware.yaml`, and a user's own."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from titans_dist.config import ConfigError


@dataclass(frozen=True)
class Gpu:
    """One GPU, and its ways to others: see hardware.yaml for the units."""

    name: str
    bfloat16: float
    float32: float
    memory_gb: float
    memory_bandwidth: float
    link: float
    network: float
    has_kernels: bool = True

    def peak(self, precision: str) -> float:
        """FLOP/s of matrix products."""
        return self.bfloat16 if precision == "bfloat16" else self.float32

    @property
    def memory_bytes(self) -> float:
        return self.memory_gb * 1e9


def known() -> dict[str, Gpu]:
    """Those of hardware.yaml, by the name that plan.gpu has for them."""
    table = _read(Path(__file__).parent / "hardware.yaml")
    return {key: _gpu(key, values) for key, values in table.items()}


def gpu(name: str) -> Gpu:
    """The GPU called `name`, or the one that a YAML file describes. Raises ConfigError, one sentence."""
    table = known()
    if name.lower() in table:
        return table[name.lower()]
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"plan.gpu={name} is unknown; choose one of {', '.join(table)}, or the path of a .yaml file of your own"
        )
    if not path.is_file():
        raise ConfigError(f"plan.gpu={name} is no file; write one like titans_dist/plan/hardware.yaml, of one GPU")
    found = _read(path)
    if len(found) == 1 and isinstance(next(iter(found.values())), dict):
        found = next(iter(found.values()))
    return _gpu(name, {"name": path.stem, **found})


def _read(path: Path) -> dict[str, Any]:
    try:
        found = OmegaConf.to_container(OmegaConf.load(path))
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} has no table of keys and values; write one like titans_dist/plan/hardware.yaml")
    return {str(key): value for key, value in found.items()}


def _gpu(key: str, values: dict[str, Any]) -> Gpu:
    names = [field.name for field in fields(Gpu)]
    for name in values:
        if name not in names:
            raise ConfigError(f"{key} has {name}, which no GPU has; use {', '.join(names)}")
    for field in fields(Gpu):
        if field.name not in values:
            if field.default is MISSING:
                raise ConfigError(f"{key} lacks {field.name}; give {', '.join(names[:-1])}")
            continue
        value = values[field.name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if field.type == "float" and not (is_number and 0 < value < math.inf):
            raise ConfigError(f"{key} has {field.name}={value}, which must be a finite number above 0")
    return Gpu(**values)
