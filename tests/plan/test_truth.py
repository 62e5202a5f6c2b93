"""What a plan says that a process has, computes and sends, the real model has, computes and sends on fake tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.config.test_composition import composed
from tests.plan.models import small
from tests.plan.test_fake import apart, fakes
from titans_dist.config import Config, validate
from titans_dist.config.layout import world_size
from titans_dist.config.sizes import parameter_count
from titans_dist.plan.truth import Compared, compare


def split(variant: str, changes: dict[str, Any]) -> Config:
    """A small model of two blocks, or of as many as there are parts, and chunks of 128 tokens, on some layout."""
    keys = ("tensor", "context", "context_mode", "pipeline", "virtual", "data")
    layout = {"data": 1, **{key: changes[key] for key in keys if key in changes}}
    count = layout.get("pipeline", 1) * layout.get("virtual", 1)
    more = {"blocks": max(2, count), "memory_chunk_size": 128, "length": 512 * layout.get("context", 1)}
    more |= {key: value for key, value in changes.items() if key not in (*keys, "documents")}
    config = small(variant, precision=more.pop("precision", "bfloat16"), hidden_size=256, num_heads=8, **more)
    config.data.documents = changes.get("documents", "joined")
    config.training.global_batch_size = config.training.micro_batch_size * layout["data"] * count
    config = replace(config, parallel=replace(config.parallel, sequence=layout.get("tensor", 1) > 1, **layout))
    validate(config)
    return config


def compared(config: Config, ranks: list[int]) -> list[Compared]:
    parallel, found = config.parallel, []
    for rank, real in zip(ranks, apart(fakes, config, ranks), strict=True):
        # In ranks' order: tensor, context, data, pipeline.
        share, stage = rank // parallel.tensor % parallel.context, rank * parallel.pipeline // world_size(parallel)
        found += compare(config, parallel.data or 1, stage, share, real.ran)
    return found


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("mag", {"tensor": 2, "data": 2}),
        ("mal", {"tensor": 2, "pipeline": 2}),
        ("mag", {"context": 2, "context_mode": "heads", "rows": 1}),
        ("lmm", {"context": 2, "context_mode": "ring", "pipeline": 2}),
        ("mac", {"context": 2}),
        ("mac", {"precision": "float32", "rows": 1}),
        ("lmm", {"recompute": "none"}),
        ("mag", {"recompute": "full"}),
        ("deltanet", {"context": 2, "context_mode": "scan", "memory_chunk_size": 32}),
        ("transformer", {"pipeline": 2, "virtual": 2}),
        ("swa", {"context": 2, "rows": 1}),
        ("lmm", {"memory_preset": "moneta"}),
        ("lmm", {"memory_global_chunk_size": 128, "memory_shard_size": 256, "memory_chunk_size": 16}),
        ("mag", {"documents": "packed"}),
    ],
)
def test_formulas_hold(variant: str, changes: dict[str, Any]) -> None:
    config = split(variant, changes)
    found = compared(config, sorted({0, world_size(config.parallel) - 1}))
    assert [one for one in found if not one.holds] == []
    assert len(found) >= 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "layout"), [(7, {"tensor": 4, "data": 2}), (0, {"tensor": 8, "pipeline": 8, "data": 16})]
)
def test_formulas_hold_for_the_760m_model_on_8_and_1024_ranks(rank: int, layout: dict[str, int]) -> None:
    config = composed(
        "experiment=titans_760m",
        *(f"parallel.{key}={value}" for key, value in layout.items()),
        *("training.global_batch_size=512", "training.micro_batch_size=1"),
    )
    validate(config)
    found = compared(config, [rank])
    assert [one for one in found if not one.holds] == []
    (held,) = [one.real for one in found if one.what == "parameters"]
    if "pipeline" not in layout:
        assert held * layout["tensor"] / 2 == pytest.approx(parameter_count(config.model), rel=0.01)


def test_what_is_off_is_told() -> None:
    assert Compared("states", 103.0, 100.0, 0.02).difference == pytest.approx(0.03)
    assert not Compared("states", 103.0, 100.0, 0.02).holds
    assert not Compared("logits", 1.0, 0.0, 0.1).holds
    assert Compared("logits", 0.0, 0.0, 0.1).holds
