"""What a model keeps for the backward pass, by formula, is what the real model keeps."""

from __future__ import annotations

from typing import Any

import pytest

from tests.plan.kept import kept
from tests.plan.models import small
from titans_dist.plan.memory import memory_of

MEMORIES = ("lmm", "mac", "mag", "mal", "mamba2", "gated_deltanet")
CASES: list[dict[str, Any]] = [
    *({"variant": variant, "recompute": recompute} for variant in MEMORIES for recompute in ("selective", "none")),
    {"variant": "swa"},
    {"variant": "transformer"},
    *({"variant": variant, "recompute": "full"} for variant in ("mac", "mag", "swa")),
    {"variant": "mag", "rows": 1, "length": 1024},
    {"variant": "mac", "rows": 1},
    {"variant": "mag", "precision": "bfloat16"},
    {"variant": "mac", "precision": "bfloat16"},
    {"variant": "swa", "num_kv_heads": 2},
    {"variant": "mal", "memory_expansion": 1, "recompute": "none"},
    {"variant": "lmm", "memory_depth": 3, "recompute": "none"},
    {"variant": "lmm", "memory_channel_wise": True},
    {"variant": "lmm", "memory_global_chunk_size": 128, "memory_shard_size": 128, "recompute": "none"},
    *({"variant": "lmm", "memory_preset": preset} for preset in ("moneta", "memora", "longhorn")),
    *({"variant": "lmm", "memory_preset": p, "recompute": "none"} for p in ("moneta", "yaad", "ttt_linear")),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_the_model_keeps_what_the_formula_says(case: dict[str, Any]) -> None:
    config = small(**case)
    planned = memory_of(config, data_size=1)
    assert planned.activations + planned.states == pytest.approx(sum(kept(config).values()), rel=0.08)


def test_the_states_between_groups_are_all_that_a_wider_memory_adds() -> None:
    narrow, wide = (small("lmm", length=1024, memory_expansion=expansion) for expansion in (1, 4))
    planned = [memory_of(config, data_size=1).states for config in (narrow, wide)]
    assert planned[1] == 4 * planned[0]
    more = sum(kept(wide).values()) - sum(kept(narrow).values())
    assert more == pytest.approx(planned[1] - planned[0], rel=0.02)
