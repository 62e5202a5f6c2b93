"""Does a layout compute what one process computes? A user's smoke test of model, layout and machines.

The layout's processes train the configured model, made narrow, for some steps; rank 0 then trains the same alone, with
plain torch: no process groups, no megatron-core, no optimizer but AdamW.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from torch import Tensor, nn
from torch.nn import functional as F

from titans_dist.config import Config, ConfigError, OptimizerConfig, validate
from titans_dist.config.layout import bubble, context_groups, model_size, uses_ring
from titans_dist.layers.parameter import Parameter
from titans_dist.model import LanguageModel, build_model
from titans_dist.parallel.communication import Communication, Row, count_communication, table
from titans_dist.parallel.context import ring
from titans_dist.parallel.engines import build_engine
from titans_dist.parallel.pipeline import whole_name
from titans_dist.parallel.processes import processes
from titans_dist.parallel.schedule import loss_and_tokens, run_schedule
from titans_dist.parallel.stage import MicroBatch, build_stages, stage_inputs
from titans_dist.plan.communication import analytic

STEPS = 3
HEAD_DIM = 16
TOLERANCE = {"loss": 1e-5, "gradient norm": 1e-4, "gradient": 1e-3}
"""Largest differences, of gradients as a share of the parameter's largest; in float32 1e-8 to 1e-5 were seen."""


@dataclass
class Comparison:
    """One number of the layout beside that of one process; of a gradient the difference alone."""

    what: str
    layout: float | None
    reference: float | None
    difference: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether the difference is what rounding makes; a number that is not finite never is."""
        return self.difference <= self.tolerance


@dataclass
class CheckResult:
    """What the check found, on rank 0."""

    comparisons: list[Comparison]
    world: int
    bubble: float | None
    """Share of its turns that a process of the ring waits, replayed from what was done; None without a ring."""
    expected_bubble: float | None
    """The same by its formula."""
    sent: list[Row]
    """What rank 0 has sent in one step, as counted and as worked out beforehand."""

    @property
    def passed(self) -> bool:
        """Whether everything agrees."""
        return all(one.agrees for one in self.comparisons)


def check_layout(config: Config) -> CheckResult | None:
    """Compare the layout of `config` with one process, on every process of the job; rank 0 returns the result.

    Raises ConfigError where the processes do not fill the layout.
    """
    with processes(config) as device:
        copies = dist.get_world_size() // model_size(config.parallel)
        small = narrow(config, copies)
        ring.turns = [] if uses_ring(small) else None
        gradients = layout_gradients(small, device)
        turns, ring.turns = ring.turns, None
        curve, counted = _train(small, device)
        alone = _one_process(small, device) if dist.get_rank() == 0 else None
        shared = [alone]
        dist.broadcast_object_list(shared, src=0)
        alone = shared[0]
        assert alone is not None
        differences = _differences(small, gradients, alone.gradients)
        waited = None if turns is None else _replayed(turns)
        if dist.get_rank() != 0:
            return None
        comparisons = [
            Comparison(f"{what} at step {step}", a, b, _relative(a, b), TOLERANCE[what])
            for what, found, right in (
                ("loss", curve.losses, alone.losses),
                ("gradient norm", curve.norms, alone.norms),
            )
            for step, (a, b) in enumerate(zip(found, right, strict=True), 1)
        ]
        comparisons += [
            Comparison(f"gradient of {name}", None, None, difference, TOLERANCE["gradient"])
            for name, difference in differences.items()
        ]
        groups = context_groups(small.parallel, small.training.micro_batch_size, _heads_in_a_ring(small))
        expected = None if waited is None else bubble(small.parallel.context, groups)
        try:
            traffic = analytic(small, copies)
        except ConfigError:  # not worked out for this layout; counted it is
            traffic = []
        return CheckResult(comparisons, dist.get_world_size(), waited, expected, table(counted, traffic))


def narrow(config: Config, copies: int) -> Config:
    """The configuration with heads of 16 dimensions, few blocks, a small vocabulary and few sequences.

    What decides the layout stays: heads, window, segments, chunks, the length of the sequences.
    """
    model, parallel = config.model, config.parallel
    count = parallel.pipeline * parallel.virtual
    layers = (
        model.num_layers if parallel.layers else min(model.num_layers, max(2, count + (model.num_layers % count > 0)))
    )
    small = dataclasses.replace(
        model,
        num_layers=layers,
        hidden_size=model.num_heads * HEAD_DIM,
        intermediate_size=64 * parallel.tensor,
        parameters=None,
        vocab_size=128 * parallel.tensor,
    )
    rows = 2
    training = dataclasses.replace(
        config.training,
        steps=STEPS,
        micro_batch_size=rows,
        global_batch_size=rows * copies * parallel.pipeline,
        precision="float32",
        carry_state=False,
    )
    made = dataclasses.replace(
        config,
        model=small,
        training=training,
        # With a small epsilon Adam's first steps are the gradient's sign, which turns rounding into whole steps.
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=0, eps=1e-2),
    )
    validate(made)
    return made


@dataclass
class _Curve:
    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]


def _rows(config: Config, step: int) -> MicroBatch:
    """All sequences of one step, the same on every process."""
    generator = torch.Generator().manual_seed(config.data.seed + step)
    count, length = config.training.global_batch_size, config.data.sequence_length
    rows = {"tokens": torch.randint(0, config.model.vocab_size, (count, length + 1), generator=generator)}
    if config.data.documents == "packed":
        starts = torch.rand(count, length, generator=generator) < 4 / length
        starts[:, 0] = True
        rows["starts"] = starts
    return rows


def _micro_batches(config: Config, step: int, share: int = 0, shares: int = 1) -> list[MicroBatch]:
    """One data-parallel share of a step."""
    rows = {name: x.chunk(shares)[share] for name, x in _rows(config, step).items()}
    split = {name: x.split(config.training.micro_batch_size) for name, x in rows.items()}
    return [dict(zip(split, parts, strict=True)) for parts in zip(*split.values(), strict=True)]


def layout_gradients(config: Config, device: torch.device) -> dict[str, tuple[Tensor, int | None]]:
    """This process's part of the first step's gradients, with the dimension that tensor parallelism splits."""
    stages = build_stages(config, device)
    transformer = stages[0].config
    modules = [DistributedDataParallel(transformer, DistributedDataParallelConfig(), stage) for stage in stages]
    transformer.finalize_model_grads_func = finalize_model_grads
    data = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()

    def forward(batches: Iterator[tuple[int, MicroBatch]], module: nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
        return module(*stage_inputs(next(batches)[1], device)), loss_and_tokens

    run_schedule(modules, forward, _micro_batches(config, 0, *data))
    found = {}
    for stage in stages:
        for name, value in stage.model.named_parameters():
            axis = value.partition_dim if value.tensor_model_parallel else None  # type: ignore[attr-defined]
            found[whole_name(name, config.model)] = (value.main_grad, axis)  # type: ignore[attr-defined]
    return found


def _train(config: Config, device: torch.device) -> tuple[_Curve, Communication]:
    """The layout's own training step, engine and all, and what this process has sent in the last one."""
    engine = build_engine(config, device)
    losses, norms, sent = [], [], Communication()
    for step in range(STEPS):
        with count_communication() if step == STEPS - 1 else nullcontext(sent) as sent:
            result = engine.step(_micro_batches(config, step, engine.data_rank, engine.data_size))
        losses.append(result.loss)
        norms.append(result.grad_norm)
    return _Curve(losses, norms, {}), sent


def _one_process(config: Config, device: torch.device) -> _Curve:
    """Plain torch: the whole model, one micro-batch after the other."""
    model, settings = build_model(config.model, config.training.seed), config.optimizer
    decays = {name for name, value in model.named_parameters() if isinstance(value, Parameter) and value.decay}
    model.set_recompute(config.training.recompute)
    model = model.to(device)
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [x for name, x in named.items() if name in decays], "weight_decay": settings.weight_decay},
            {"params": [x for name, x in named.items() if name not in decays], "weight_decay": 0.0},
        ],
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
    )
    curve = _Curve([], [], {})
    for step in range(STEPS):
        optimizer.zero_grad()
        batches, total = _micro_batches(config, step), 0.0
        for batch in batches:
            loss = _loss(model, batch, device) / len(batches)
            loss.backward()
            total += loss.item()
        if step == 0:
            curve.gradients = {name: x.grad.detach().cpu().clone() for name, x in named.items() if x.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad or math.inf)
        share = (1 + math.cos(math.pi * (step + 1) / STEPS)) / 2
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * share)
        optimizer.step()
        curve.losses.append(total)
        curve.norms.append(float(norm))
    return curve


def _loss(model: LanguageModel, batch: MicroBatch, device: torch.device) -> Tensor:
    tokens, starts = batch["tokens"].to(device), batch.get("starts")
    logits = model(tokens[:, :-1], starts=None if starts is None else starts.to(device))
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def _differences(
    config: Config, found: dict[str, tuple[Tensor, int | None]], wanted: dict[str, Tensor]
) -> dict[str, float]:
    """Of each kind of parameter, all blocks together, the largest difference on any process."""
    ways, rank = config.parallel.tensor, parallel_state.get_tensor_model_parallel_rank()
    own: dict[str, float] = {}
    for name, (gradient, axis) in found.items():
        whole = wanted[name]
        right = whole if axis is None else whole.chunk(ways, axis)[rank]
        difference = float((gradient.detach().cpu() - right).abs().max() / whole.abs().max())
        kind = ".".join("*" if part.isdigit() and i == 1 else part for i, part in enumerate(name.split(".")))
        own[kind] = _larger(own.get(kind, 0.0), difference)
    everybody: list[dict[str, float]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everybody, own)
    kinds = {kind: None for one in everybody for kind in one}
    return {kind: _most(one.get(kind, 0.0) for one in everybody) for kind in kinds}


def _replayed(turns: list[tuple[str, int]]) -> float:
    """The share of waiting in all waves of this process's ring, the largest of all rings."""
    group = parallel_state.get_context_parallel_group()
    ranks: list[list[tuple[str, int]]] = [[] for _ in range(group.size())]
    dist.all_gather_object(ranks, turns, group=group)
    return _most(ring.waiting(wave) for wave in ring.waves(ranks))


def _heads_in_a_ring(config: Config) -> int:
    return 1 if config.model.variant == "mac" else config.model.num_heads // config.parallel.tensor


def _relative(a: float, b: float) -> float:
    return abs(a - b) / abs(b) if math.isfinite(a) and math.isfinite(b) and b else math.inf


def _larger(a: float, b: float) -> float:
    """Not finite counts as infinitely large, whatever the order."""
    return max(a, b) if math.isfinite(a) and math.isfinite(b) else math.inf


def _most(values: Any) -> float:
    largest = 0.0
    for value in values:
        largest = _larger(largest, value)
    return largest
