"""Held-out losses on every layout are those of the plain model, each valid row counted once."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.distributed import run_distributed
from tests.parallel.layouts import LENGTH, MODELS, config
from titans_dist.config import Config
from titans_dist.config.layout import world_size
from titans_dist.model import build_model

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2_dp2": {"tensor": 2, "data": 2},
    "pp2": {"pipeline": 2},
    "pp2_vpp2": {"pipeline": 2, "virtual": 2},
    "cp2": {"context": 2},
    "tp2_pp2_cp2": {"tensor": 2, "pipeline": 2, "context": 2},
}
# Three micro-batches of two rows for each copy: no whole number of groups of two stages. One row does not count.
BATCHES, ROWS = 3, 2


def batches(copy: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(copy)
    made = []
    for number in range(BATCHES):
        tokens = torch.randint(0, 64, (ROWS, LENGTH + 1), generator=generator)
        made.append({"tokens": tokens, "valid": torch.tensor([True, number < 2])})
    return made


def scored(rank: int, world: int, settings: Config) -> tuple[float, int]:
    from titans_dist.parallel import cpu
    from titans_dist.parallel.processes import make_groups
    from titans_dist.parallel.scorer import Scorer

    cpu.install()
    make_groups(settings.parallel)
    scorer = Scorer(settings, torch.device("cpu"))
    return scorer.total_loss(batches(scorer.data_rank))


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_the_total_is_that_of_the_plain_model(layout: str) -> None:
    settings = config(MODELS["mag"], **LAYOUTS[layout])
    model = build_model(settings.model, settings.training.seed)
    rows = [
        row
        for copy in range(settings.parallel.data or 1)
        for batch in batches(copy)
        for row in batch["tokens"][batch["valid"]]
    ]
    wanted = sum(F.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="sum").item() for row in rows)
    for loss, tokens in run_distributed(scored, world_size(settings.parallel), settings):
        assert tokens == len(rows) * LENGTH
        assert loss == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("layout", ["one", "pp2", "pp2_vpp2"])
@torch.no_grad()
def test_a_carried_state_goes_from_micro_batch_to_micro_batch_in_every_stage(layout: str) -> None:
    settings = config(MODELS["lmm"], **LAYOUTS[layout])
    training = dataclasses.replace(settings.training, carry_state=True)
    model = build_model(settings.model, settings.training.seed)
    state, wanted = model.initial_state(ROWS), 0.0
    for batch in batches(0):
        logits, state = model(batch["tokens"][:, :-1], state=state)
        losses = F.cross_entropy(logits.mT, batch["tokens"][:, 1:], reduction="none")
        wanted += losses[batch["valid"]].sum().item()
    found = run_distributed(scored, world_size(settings.parallel), dataclasses.replace(settings, training=training))
    assert found[0][0] == pytest.approx(wanted, rel=1e-6)
