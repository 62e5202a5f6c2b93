"""What questions are made of: background text, a tokenizer, the held-out tokens of the run's data."""

from __future__ import annotations

from pathlib import Path

import torch

from titans_dist.config import Config
from titans_dist.evaluation.measure import POSITIONS, Material
from titans_dist.evaluation.samples import Samples
from titans_dist.evaluation.tasks import load_text, tasks
from titans_dist.run.data import open_sources, open_tokenizer


def gather(config: Config) -> Material:
    """All of it, as the configuration says. Of a mixture, the first source's held-out text and tokenizer count."""
    settings = config.evaluation
    name, held_out = next(iter(open_sources(config, "validation").items()))
    asks = any(task != POSITIONS for task in settings.tasks)
    tokenizer = open_tokenizer(config, name) if asks else None
    samples = None
    if tokenizer is not None:
        folder = Path(config.run_dir) / "reports" / "samples"
        samples = Samples(folder, tasks(settings.babi), tokenizer, load_text(settings.text), settings.babi)
    return Material(
        samples=samples,
        task_folder=settings.task_folder,
        held_out=lambda start, count: torch.from_numpy(held_out.read(start, count)[0]),
        held_out_tokens=held_out.num_tokens,
        bytes_per_token=held_out.bytes_per_token,
    )
