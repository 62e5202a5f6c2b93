"""Training along a stream: segments with their state carried over are one long text, on every layout."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.distributed import run_distributed
from titans_dist.checkpoint import sharded
from titans_dist.checkpoint.store import Store
from titans_dist.config import Config, MemoryConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from titans_dist.model import build_model, flatten

STEPS, LANES, LENGTH = 5, 4, 16
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    vocab_size=64,
    window=6,
    segment_length=24,  # ends inside a training segment
    persistent_tokens=4,
    init_std=0.1,  # large, so that what is remembered shows in the loss
    memory=MemoryConfig(expansion=2, chunk_size=8, theta_max=0.05, state_grad_clip=None),
)
CONFIG = Config(
    model=MODEL,
    training=TrainingConfig(steps=STEPS, micro_batch_size=2, global_batch_size=LANES, carry_state=True),
    # A constant learning rate. With a small epsilon Adam's first steps would be the gradient's sign: rounding shows.
    optimizer=OptimizerConfig(lr=5e-3, warmup_steps=0, min_lr_ratio=1.0, clip_grad=0, eps=1e-2),
)
STILL = OptimizerConfig(lr=0.0, warmup_steps=0, weight_decay=0.0)
VARIANTS = {
    "lmm": {},
    "mac": {},
    "mag": {},
    "mal": {},
    "swa": {},
    "gated_deltanet": {"memory": MemoryConfig(chunk_size=8)},
    "transformer": {},
    "retnet": {"variant": "lmm", "memory": MemoryConfig(preset="retnet", chunk_size=8)},
    "tnt": {"variant": "lmm", "memory": MemoryConfig(chunk_size=4, global_chunk_size=16, shard_size=24)},
}
LAYOUTS = {
    "one": (1, ParallelConfig()),
    "tp2": (2, ParallelConfig(tensor=2)),
    "dp2": (2, ParallelConfig()),
    "tp2_dp2": (4, ParallelConfig(tensor=2)),
    "pp2": (2, ParallelConfig(pipeline=2)),
}
"""Name -> processes, and how they share the work."""

# Repeated words, so that a model that remembers does better; documents begin anywhere, at borders and in chunks.
_DRAW = torch.Generator().manual_seed(0)
TOKENS = torch.randint(0, 64, (LANES, 20), generator=_DRAW).repeat(1, 5)[:, : STEPS * LENGTH + 1]
STARTS = torch.zeros(LANES, STEPS * LENGTH, dtype=torch.bool)
STARTS[:, 0] = True
STARTS[1, 16] = STARTS[2, 37] = STARTS[2, 43] = STARTS[3, 31] = True


def batch(step: int) -> dict[str, Tensor]:
    """The segments of all lanes."""
    first, last = step * LENGTH, (step + 1) * LENGTH
    return {"tokens": TOKENS[:, first : last + 1], "starts": STARTS[:, first:last]}


def configured(
    variant: str = "mag", parallel: ParallelConfig = LAYOUTS["one"][1], micro_batch: int = 2, **changes: Any
) -> Config:
    model = dataclasses.replace(MODEL, **({"variant": variant} | VARIANTS[variant]))
    training = dataclasses.replace(CONFIG.training, micro_batch_size=micro_batch)
    config = dataclasses.replace(CONFIG, model=model, training=training, parallel=parallel)
    return dataclasses.replace(config, **changes)


def started(config: Config) -> Any:
    """An engine in a forked rank."""
    from titans_dist.parallel import cpu
    from titans_dist.parallel.engine import Engine
    from titans_dist.parallel.processes import make_groups

    cpu.install()
    make_groups(config.parallel)
    return Engine(config, torch.device("cpu"))


def take(engine: Any, config: Config, steps: range) -> list[float]:
    """Train these steps; their losses."""
    losses = []
    for step in steps:
        mine = {name: value.chunk(engine.data_size)[engine.data_rank] for name, value in batch(step).items()}
        parts = {name: value.split(config.training.micro_batch_size) for name, value in mine.items()}
        count = len(parts["tokens"])
        losses.append(engine.step([{name: parts[name][i] for name in parts} for i in range(count)]).loss)
    return losses


def train(rank: int, world: int, config: Config) -> list[float]:
    return take(started(config), config, range(STEPS))


@torch.no_grad()
def long_pass(config: Config) -> list[float]:
    """The loss of every segment when a plain model reads each lane in one go."""
    logits = build_model(config.model, config.training.seed)(TOKENS[:, :-1], starts=STARTS)
    losses = F.cross_entropy(logits.mT, TOKENS[:, 1:], reduction="none")
    return losses.unflatten(1, (STEPS, LENGTH)).mean((0, 2)).tolist()


def one_process(config: Config) -> list[float]:
    """Truncated backpropagation by hand: torch AdamW on the whole model, no megatron-core."""
    model = build_model(config.model, config.training.seed)
    decay, rest = [], []
    for value in model.parameters():
        (decay if value.decay else rest).append(value)  # type: ignore[attr-defined]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.optimizer.lr, betas=(0.9, 0.95), eps=config.optimizer.eps)
    state, losses = model.initial_state(LANES), []
    for step in range(STEPS):
        part = batch(step)
        logits, state = model(part["tokens"][:, :-1], state=state.detach(), starts=part["starts"])
        loss = F.cross_entropy(logits.mT, part["tokens"][:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_text_of_these_tests_needs_its_memory() -> None:
    config = configured(optimizer=STILL)
    forgetful = dataclasses.replace(config, training=dataclasses.replace(config.training, carry_state=False))
    without = run_distributed(train, 1, forgetful)[0]
    whole = long_pass(config)
    assert without[0] == pytest.approx(whole[0], abs=1e-6)  # here nothing is carried yet
    assert all(abs(a - b) > 1e-3 for a, b in zip(without[1:], whole[1:], strict=True))


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "transformer"])
def test_segments_give_the_losses_of_one_long_pass(variant: str) -> None:
    config = configured(variant, LAYOUTS["tp2"][1], optimizer=STILL)
    for losses in run_distributed(train, 2, config):
        assert losses == pytest.approx(long_pass(config), abs=2e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_truncated_backpropagation_on_every_layout(layout: str) -> None:
    world, parallel = LAYOUTS[layout]
    config = configured(parallel=parallel)
    wanted = one_process(config)
    assert wanted[-1] < wanted[0] - 0.1  # it learns
    for losses in run_distributed(train, world, config):
        assert losses == pytest.approx(wanted, abs=2e-5)


def test_bfloat16_carries_its_memory_in_float32() -> None:
    def dtypes(rank: int, world: int) -> dict[str, torch.dtype]:
        config = configured()
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, precision="bfloat16"))
        engine = started(config)
        losses = take(engine, config, range(STEPS))
        assert losses == pytest.approx(one_process(configured()), rel=2e-2)
        return {name: value.dtype for name, value in flatten(engine.carried[0][0]).items() if value.dim()}

    found = run_distributed(dtypes, 1)[0]
    assert found["layers.0.memory.memory.weights.0"] == torch.float32
    assert found["layers.0.attention.k"] == torch.bfloat16


@pytest.mark.parametrize("variant", ["mag", "mac", "transformer"])
def test_packed_documents_have_the_losses_they_have_alone(variant: str) -> None:
    borders = (0, 8, 24, 48)  # whole chunks and segments: the memory of a document alone is written in the same ones
    row = TOKENS[:1, :49]
    starts = torch.zeros(1, 48, dtype=torch.bool)
    starts[:, borders[:-1]] = True
    config = configured(variant, optimizer=STILL, training=TrainingConfig(global_batch_size=1, micro_batch_size=1))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, segment_length=8))

    def losses(rank: int, world: int) -> tuple[float, float]:
        engine = started(config)
        return engine.step([{"tokens": row, "starts": starts}]).loss, engine.step([{"tokens": row}]).loss

    model = build_model(config.model, config.training.seed)
    with torch.no_grad():
        alone = [
            F.cross_entropy(model(row[:, begin:end])[0], row[0, begin + 1 : end + 1], reduction="none")
            for begin, end in itertools.pairwise(borders)
        ]
    packed, joined = run_distributed(losses, 1)[0]
    assert packed == pytest.approx(torch.cat(alone).mean().item(), abs=1e-5)
    assert abs(joined - packed) > 1e-3


# Checkpoints


def save_half_way(rank: int, world: int, config: Config, root: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of all steps, and the state that the first micro-batch's lanes carry at the end."""
    engine = started(config)
    losses = take(engine, config, range(3))
    assert sharded.save(Store(root), 3, engine.sharded_state(), {}, keep=2).error is None
    losses += take(engine, config, range(3, STEPS))
    return losses, flatten(engine.carried[0][0])


def go_on(rank: int, world: int, config: Config, root: Path) -> tuple[list[float], dict[str, Tensor]]:
    """The same of the steps after the save."""
    engine = started(config)
    take(engine, config, range(1))  # leaves something to overwrite
    engine.load(sharded.load(Store(root), 3, engine.sharded_state(is_loading=True)), 3)
    losses = take(engine, config, range(3, STEPS))
    return losses, flatten(engine.carried[0][0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_training_is_bit_equal(layout: str, tmp_path: Path) -> None:
    world, parallel = LAYOUTS[layout]
    config = configured(parallel=parallel)
    unbroken = run_distributed(save_half_way, world, config, tmp_path)
    resumed = run_distributed(go_on, world, config, tmp_path)
    for (wanted, wanted_state), (losses, state) in zip(unbroken, resumed, strict=True):
        assert losses == wanted[3:]
        assert set(state) == set(wanted_state)
        for name, value in wanted_state.items():
            assert torch.equal(state[name], value), name


@pytest.mark.parametrize(
    ("variant", "before", "after"),
    [
        pytest.param("mag", ("tp2", 4), ("one", 1), id="mag: two halves of the heads, then one and fewer rows"),
        pytest.param("mac", ("dp2", 1), ("tp2", 4), id="mac: two copies, then two halves and more rows"),
        pytest.param("tnt", ("one", 2), ("tp2_dp2", 1), id="tnt: one process, then four"),
        pytest.param("mag", ("dp2", 2), ("one", 4), id="mag: two copies, then one"),
        pytest.param("mac", ("pp2", 2), ("one", 4), id="mac: two stages, then one"),
        pytest.param("mal", ("tp2", 2), ("pp2", 1), id="mal: two halves, then two stages"),
    ],
)
def test_another_layout_goes_on_with_the_same_state(
    variant: str, before: tuple[str, int], after: tuple[str, int], tmp_path: Path
) -> None:
    (world, parallel), (new_world, new_parallel) = LAYOUTS[before[0]], LAYOUTS[after[0]]
    unbroken = run_distributed(save_half_way, world, configured(variant, parallel, before[1]), tmp_path)
    for losses, _ in run_distributed(go_on, new_world, configured(variant, new_parallel, after[1]), tmp_path):
        assert losses == pytest.approx(unbroken[0][0][3:], abs=2e-5)
