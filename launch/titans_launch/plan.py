"""`titans-dist plan`: will it fit, how fast, and what to change; from the configuration alone."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from math import inf
from pathlib import Path
from typing import Any

from rich.table import Table

from titans_dist.config import Config, ConfigError, UserError
from titans_dist.plan.fit import Plan, copies_of, layouts, nearest, plan, search
from titans_dist.plan.hardware import gpu
from titans_dist.plan.report import layout_row, place_of, rank_of, report
from titans_dist.plan.truth import Compared, compare
from titans_launch import tables

PARTS = ("parameters", "gradients", "optimizer", "activations", "states", "logits", "workspace", "reserve")
SHOWN = 8
"""Nodes and stages that tables list; the rest is in --json."""


def run(config: Config, as_json: bool = False, verify: bool = False) -> int:
    """Print the plan; 0 if it fits, 1 if not. With plan.search the layouts of so many GPUs; 1 if none fits.

    verify: run the real model of a process on tensors without numbers, and show its figures beside the plan's; 1 as
    well where the two are further apart than they may be.
    """
    card = gpu(config.plan.gpu)
    if config.plan.search is not None:
        if verify:
            raise ConfigError("--verify is for one layout, and --search lists several; choose one of the two")
        return _search(config, config.plan.search, as_json)
    found = plan(config, card, copies_of(config))
    near = None if found.fits else nearest(config, found.world, card)
    told = report(found, near)
    verified = _verify(found) if verify else {}
    holds = all(one.holds for compared in verified.values() for one in compared)
    if as_json:
        told["verified"] = [
            {"rank": rank, **asdict(one), "holds": one.holds} for rank, every in verified.items() for one in every
        ]
        print(json.dumps(told, indent=2))
    else:
        _show(config, found, told)
        _show_verified(found, verified)
    if config.plan.picture is not None:
        draw(told, found, Path(config.plan.picture))
    return 0 if found.fits and holds else 1


def _verify(found: Plan) -> dict[int, list[Compared]]:
    """By rank, of the stage that needs most, the first and the last: the plan's numbers and the real model's."""
    from titans_dist.parallel.fake import measured_apart

    config = found.config
    stages = sorted({0, found.worst.stage, config.parallel.pipeline - 1})
    ranks = [rank_of(found, stage) for stage in stages]
    with ThreadPoolExecutor() as pool:
        ran = [one.ran for one in pool.map(lambda rank: measured_apart(config, rank), ranks)]
    share = config.parallel.context - 1
    return {
        rank: compare(config, found.copies, stage, share, one)
        for rank, stage, one in zip(ranks, stages, ran, strict=True)
    }


def _search(config: Config, world: int, as_json: bool) -> int:
    card = gpu(config.plan.gpu)
    best = search(config, world, card)
    rows = [layout_row(one) for one, _ in best]
    if as_json:
        print(json.dumps(rows, indent=2))
        return 0 if rows else 1
    if not rows:
        least = min(layouts(config, world, card), key=lambda one: one.worst.peak(), default=None)
        needed = "no layout is legal" if least is None else f"the least is {_gb(least.worst.peak())} a GPU"
        print(f"no layout of {world} x {card.name} fits: {needed}; use more GPUs or shorter sequences")
        return 1
    table = Table(title=f"best layouts of {world} x {card.name}", title_justify="left")
    for name in ("layout", "micro-batch", "recompute", "peak", "step", "MFU", "days"):
        table.add_column(name, overflow="fold", justify="left" if name in ("layout", "recompute") else "right")
    for row in rows:
        table.add_row(
            row["layout"],
            str(row["micro_batch_size"]),
            row["recompute"],
            _gb(row["peak_bytes"]),
            _seconds(row["step_s"]),
            _percent(row["mfu"]),
            _span(row["days"], ".1f"),
        )
    tables.console().print(table)
    return 0


def _show(config: Config, found: Plan, told: dict[str, Any]) -> None:
    fits = "fits" if found.fits else "does not fit"
    capacity = f"{fits}: {_gb(found.worst.peak())} of {_gb(found.gpu.memory_bytes)}"
    rows = [
        ("verdict", capacity),
        ("bound by", told["bound"]),
        ("model", f"{told['model_parameters']:,} parameters"),
        ("layout", f"{found.world} x {found.gpu.name}: {told['layout']}"),
    ]
    if not found.fits:
        rows.append(("nearest that fits", " ".join(told["nearest"]) if told["nearest"] else "none of as many GPUs"))
    tables.show("plan", rows)
    _show_memory(told)
    _show_flops(told)
    _show_time(config, told)
    _show_nodes(told)
    tables.show("assumptions", told["assumptions"].items())
    for warning in told["warnings"]:
        print(f"warning: {warning}")


def _show_memory(told: dict[str, Any]) -> None:
    rows = told["memory"]
    table = Table(title="memory of a GPU in GB", title_justify="left")
    table.add_column("", no_wrap=True)
    for row in rows[:SHOWN]:
        table.add_column(f"stage {row['stage']}" if len(rows) > 1 else "", justify="right")
    for part in (*PARTS, "peak"):
        table.add_row(part, *(f"{row[f'{part}_bytes'] / 1e9:.2f}" for row in rows[:SHOWN]))
    table.add_row("blocks", *(str(row["blocks"]) for row in rows[:SHOWN]))
    table.add_row("micro-batches in flight", *(str(row["micro_batches_in_flight"]) for row in rows[:SHOWN]))
    tables.console().print(table)
    _rest(len(rows), "stages")


def _show_flops(told: dict[str, Any]) -> None:
    table = Table(title="MFLOP per token", title_justify="left")
    for name in ("", "matrix products", "attention", "memory operator", "sum"):
        table.add_column(name, justify="right" if name else "left")
    what = {"forward": "forward", "training": "forward and backward (basis of the MFU)", "performed": "computed in all"}
    for key, name in what.items():
        values = list(told["flops_per_token"][key].values())
        table.add_row(name, *(f"{value / 1e6:,.1f}" for value in (*values, sum(values))))
    tables.console().print(table)


def _show_time(config: Config, told: dict[str, Any]) -> None:
    time = told["time"]
    rows = [
        (f"{one['kind']} messages", f"{_gb(one['size_bytes'])} in {one['calls']:,} calls, by {one['link']}: "
         f"{_seconds(one['seconds'])}")
        for one in time["messages"]
    ]  # fmt: skip
    if config.parallel.pipeline > 1:
        rows.append(("pipeline bubble", f"{time['pipeline_bubble']:.0%}"))
    if time["ring_bubble"]:
        rows.append(("ring bubble", f"{time['ring_bubble']:.0%} of the memory's time"))
    tables.show(
        "one step of one GPU, and the run: an estimate",
        [
            ("computation", _seconds(time["compute_s"])),
            *rows,
            ("step", f"{_seconds(time['step_s'])} for {told['tokens_per_step']:,} tokens"),
            ("MFU", _percent(time["mfu"])),
            ("tokens a day", _span({k: v / 1e9 for k, v in time["tokens_per_day"].items()}, ".2f", "billion")),
            ("run", f"{config.training.steps:,} steps: {_span(time['days'], '.1f', 'days')}, "
             f"{_span(time['gpu_hours'], ',.0f', 'GPU hours')}"),
            ("checkpoint", f"{_gb(time['checkpoint_bytes'])}, {_seconds(time['checkpoint_s'])} to write"),
            ("data", _span({k: v / 1e6 for k, v in time["data_bytes_per_s"].items()}, ".2f", "MB/s of tokens")),
        ],
    )  # fmt: skip


def _show_nodes(told: dict[str, Any]) -> None:
    def words(node: dict[str, Any]) -> str:
        kinds = [k for k in ("tensor", "context", "data", "pipeline") if max(n[k][1] for n in told["ranks"])]
        return ", ".join(f"{kind} {_between(*node[kind])}" for kind in kinds) or "the whole model"

    rows = [(f"node {n['node']}", f"ranks {_between(*n['ranks'])}: {words(n)}") for n in told["ranks"][:SHOWN]]
    tables.show("ranks", rows)
    _rest(len(told["ranks"]), "nodes")


def _show_verified(found: Plan, verified: dict[int, list[Compared]]) -> None:
    for rank, every in verified.items():
        stage = place_of(found, rank)["pipeline"]
        title = f"rank {rank} of {found.world}, stage {stage}: the plan beside the real model, both in torch on a CPU"
        table = Table(title=title, title_justify="left")
        for name in ("", "plan", "real model", "difference", "limit"):
            table.add_column(name, justify="right" if name else "left")
        for one in every:
            limit = "none" if one.limit == inf else "exact" if one.limit < 1e-6 else f"{one.limit:.0%}"
            mark = "" if one.holds else " (!)"
            table.add_row(one.what, *map(_number, (one.planned, one.real)), f"{one.difference:+.1%}{mark}", limit)
        tables.console().print(table)
    off = [one.what for every in verified.values() for one in every if not one.holds]
    if off:
        print(f"the plan is off: {', '.join(dict.fromkeys(off))}; trust the real model's numbers")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value < 1e6 else f"{value / 1e6:,.1f} M"


def _rest(count: int, what: str) -> None:
    if count > SHOWN:
        print(f"and {count - SHOWN} more {what}: see --json")


def draw(told: dict[str, Any], found: Plan, path: Path) -> None:
    """Stacked bars of the memory of each stage. Raises UserError where matplotlib is not there."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(
            'plan.picture needs matplotlib, which is not installed; pip install "titans-dist[plot]"'
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = told["memory"]
    figure, axes = pyplot.subplots(figsize=(max(5.0, 1.0 * len(stages) + 3), 4.5))
    bottom = [0.0] * len(stages)
    for part in PARTS:
        sizes = [one[f"{part}_bytes"] / 1e9 for one in stages]
        axes.bar([str(one["stage"]) for one in stages], sizes, bottom=bottom, label=part, width=0.6)
        bottom = [a + b for a, b in zip(bottom, sizes, strict=True)]
    axes.axhline(found.gpu.memory_gb, color="black", linestyle="--", label=found.gpu.name)
    axes.set_xlabel("pipeline stage")
    axes.set_ylabel("GB of one GPU")
    axes.set_title(f"{told['model_parameters'] / 1e9:.2f}B parameters, {told['layout']}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def _between(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


def _span(ends: dict[str, float], form: str, unit: str = "") -> str:
    low, high = sorted((ends["slow"], ends["fast"]))
    return f"{low:{form}} to {high:{form}} {unit}".rstrip()


def _seconds(ends: dict[str, float]) -> str:
    return _span(ends, ".3g", "s")


def _percent(ends: dict[str, float]) -> str:
    return f"{ends['slow']:.0%} to {ends['fast']:.0%}"
