"""Which training engine a run has."""

from __future__ import annotations

import torch

from titans_dist.config import Config
from titans_dist.parallel.deepspeed_engine import DeepSpeedEngine
from titans_dist.parallel.engine import Engine


def build_engine(config: Config, device: torch.device) -> Engine | DeepSpeedEngine:
    """The parallel model with its optimizer, as `training.engine` says. Collective."""
    return DeepSpeedEngine(config, device) if config.training.engine == "deepspeed" else Engine(config, device)
