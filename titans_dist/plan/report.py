"""A plan in plain data: what `titans-dist plan --json` prints, and what its tables are made of."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from titans_dist.config.layout import describe_layout
from titans_dist.config.sizes import parameter_count
from titans_dist.plan import flops
from titans_dist.plan.estimate import ASSUMPTIONS, gpus_per_node
from titans_dist.plan.fit import Plan, bound, overrides, warnings


def report(found: Plan, near: Plan | None) -> dict[str, Any]:
    """Everything about one layout, and of `near`, the nearest that fits, what is to be changed."""
    config, time = found.config, found.estimate()
    stages = [
        {
            "stage": one.stage,
            "blocks": one.blocks,
            "micro_batches_in_flight": one.in_flight,
            **{f"{name}_bytes": size for name, size in vars(one.memory).items()},
            "workspace_bytes": max(0, one.workspace - one.memory.logits),
            "reserve_bytes": one.reserve,
            "peak_bytes": one.peak(),
        }
        for one in found.stages
    ]
    return {
        "model_parameters": parameter_count(config.model),
        "gpu": found.gpu.name,
        "gpus": found.world,
        "layout": describe_layout(config.parallel, found.copies),
        "tokens_per_step": config.training.global_batch_size * config.data.sequence_length,
        "fits": found.fits,
        "bound": bound(found),
        "nearest": None if near is None else overrides(config, near.config),
        "memory": stages,
        "flops_per_token": {
            "forward": asdict(flops.forward(config)),
            "training": asdict(flops.training(config)),
            "performed": asdict(flops.performed(config)),
        },
        "time": asdict(time),
        "ranks": rank_map(found),
        "warnings": warnings(found),
        "assumptions": ASSUMPTIONS,
    }


def place_of(found: Plan, rank: int) -> dict[str, int]:
    """What a rank is in each way to split the work; tensor-parallel neighbors are next to each other."""
    parallel, place = found.config.parallel, {}
    for kind, size in (
        ("tensor", parallel.tensor),
        ("context", parallel.context),
        ("data", found.copies),
        ("pipeline", parallel.pipeline),
    ):
        rank, place[kind] = divmod(rank, size)
    return place


def rank_of(found: Plan, stage: int) -> int:
    """The rank that `place_of` has as the one of this pipeline stage with the last part of the sequences."""
    parallel = found.config.parallel
    return parallel.tensor * (parallel.context - 1 + parallel.context * found.copies * stage)


def rank_map(found: Plan) -> list[dict[str, Any]]:
    """For each node its ranks, and the first and last coordinate of each kind that is there."""
    node, nodes = gpus_per_node(found.config), []
    for first in range(0, found.world, node):
        last = min(first + node, found.world) - 1
        places = [place_of(found, rank) for rank in range(first, last + 1)]
        spans = {kind: [min(p[kind] for p in places), max(p[kind] for p in places)] for kind in places[0]}
        nodes.append({"node": first // node, "ranks": [first, last], **spans})
    return nodes


def layout_row(found: Plan) -> dict[str, Any]:
    """One line of a list of layouts."""
    time = found.estimate()
    return {
        "layout": describe_layout(found.config.parallel, found.copies),
        "micro_batch_size": found.config.training.micro_batch_size,
        "recompute": found.config.training.recompute,
        "peak_bytes": found.worst.peak(),
        "step_s": asdict(time.step_s),
        "mfu": asdict(time.mfu),
        "days": asdict(time.days),
    }
