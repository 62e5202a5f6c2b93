"""Pipeline parallelism: which part of the model a process holds. The schedules themselves are megatron-core's."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core import parallel_state

from titans_dist.config import ModelConfig, ParallelConfig
from titans_dist.config.layout import parts
from titans_dist.model import LanguageModel


@dataclass(frozen=True)
class Part:
    """One of the pipeline x virtual parts of the model: some blocks, the embedding before the first, the head after
    the last."""

    blocks: range
    is_first: bool
    is_last: bool
    virtual: int | None
    """Which of its stage's parts it is, in the order of the model; None where a stage has one."""


def own_parts(parallel: ParallelConfig, num_layers: int) -> list[Part]:
    """The parts that this process holds, in the order of the model."""
    stage, every = parallel_state.get_pipeline_model_parallel_rank(), parts(parallel, num_layers)
    numbers = range(stage, len(every), parallel.pipeline)
    return [
        Part(every[n], n == 0, n == len(every) - 1, virtual if parallel.virtual > 1 else None)
        for virtual, n in enumerate(numbers)
    ]


def keep(model: LanguageModel, part: Part) -> None:
    """Leave only `part` of a whole model; everything keeps its name, what is gone is None."""
    for i in range(len(model.blocks)):
        if i not in part.blocks:
            model.blocks[i] = None  # type: ignore[assignment]
    if not part.is_first:
        model.embedding = None  # type: ignore[assignment]
    if not part.is_last:
        model.norm = model.head = None  # type: ignore[assignment]


def whole_name(name: str, config: ModelConfig) -> str:
    """The name in the whole model of a parameter of one of its parts: a tied head has the embedding's weight."""
    return "embedding.weight" if config.tie_embeddings and name == "head.weight" else name
