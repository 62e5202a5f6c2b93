"""Any legal layout trains like one process: every variant and memory, on every way to split it.

Five steps in float64. `make test` runs what is not marked matrix: one variant on every layout, every one on one layout.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.parallel.layouts import MODELS, check_layout, config, one_process, variant
from titans_dist.config import ConfigError
from titans_dist.memory import chunked

LAYOUTS = {
    "tp2": {"tensor": 2, "sequence": False},
    "tp2_sp": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "pp2_vpp2": {"pipeline": 2, "virtual": 2},
    "cp2_heads": {"context": 2, "context_mode": "heads"},
    "cp2_ring": {"context": 2, "context_mode": "ring"},
    "cp2_scan": {"context": 2, "context_mode": "scan"},
    "dp2": {"data": 2},
    "tp2_pp2": {"tensor": 2, "pipeline": 2},
    "tp2_cp2": {"tensor": 2, "context": 2},
    "tp2_pp2_cp2": {"tensor": 2, "pipeline": 2, "context": 2},
}
ALWAYS = {("gated_deltanet", "cp2_scan"), *(("lmm", layout) for layout in LAYOUTS), *((m, "tp2_cp2") for m in MODELS)}
"""What `make test` runs of the matrix: one model on every layout, every model on one, and what linear ones have."""


def some_marked(names: dict[str, Any], always: set[str]) -> list[Any]:
    """The names as parameters of a test, but for those in `always` marked as a part of the matrix."""
    assert always <= set(names)
    return [pytest.param(name, marks=[] if name in always else pytest.mark.matrix) for name in names]


def is_legal(model: str, layout: str) -> bool:
    try:
        config(MODELS[model], **LAYOUTS[layout])  # type: ignore[arg-type]
    except ConfigError:
        return False
    # Attention has no memory to carry across: the three modes are one.
    return MODELS[model].has_memory or layout not in ("cp2_heads", "cp2_scan")


CASES = [
    pytest.param(model, layout, marks=[] if (model, layout) in ALWAYS else pytest.mark.matrix)
    for model in MODELS
    for layout in LAYOUTS
    if is_legal(model, layout)
]


def test_what_is_not_legal_is_what_cannot_be() -> None:
    illegal = {(m, layout) for m in MODELS for layout in LAYOUTS if MODELS[m].has_memory and not is_legal(m, layout)}
    nonlinear = {"lmm", "mac", "mag", "mal", "moneta", "yaad", "memora"}
    assert illegal == {("mac", "cp2_heads")} | {(model, "cp2_scan") for model in nonlinear}


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_losses_and_gradients_equal_one_process(model: str, layout: str) -> None:
    check_layout(config(MODELS[model], **LAYOUTS[layout]))  # type: ignore[arg-type]


UNTIED = dataclasses.replace(MODELS["mag"], tie_embeddings=False)
TNT = variant("lmm", global_chunk_size=16, shard_size=8)
SWA = variant("swa")
RETNET = variant("lmm", preset="retnet")
MATRIX_WITH_MOMENTUM = variant("lmm", depth=1, residual=False)
FULL_WIDTH = dataclasses.replace(MODELS["lmm"], num_heads=1)
GROUPED = dataclasses.replace(MODELS["mag"], num_kv_heads=2)
CHANNEL_WISE = variant("lmm", channel_wise=True, gate_rank=4)
MORE = {
    "tied_weights_in_one_stage_of_two_parts": (MODELS["mag"], {"pipeline": 2, "virtual": 2, "layers": [1, 1, 1, 1]}),
    "untied_weights_in_two_stages": (UNTIED, {"pipeline": 2}),
    "uneven_stages": (MODELS["lmm"], {"pipeline": 2, "layers": [3, 1]}),
    "three_stages_of_four_blocks": (MODELS["transformer"], {"pipeline": 3}),
    "four_in_a_ring": (MODELS["lmm"], {"context": 4, "context_mode": "ring"}),
    "one_group_in_a_ring": (MODELS["mal"], {"context": 2, "context_mode": "ring", "context_groups": 1}),
    "heads_in_groups": (MODELS["lmm"], {"context": 2, "context_mode": "ring", "context_groups": 8}),
    "four_scan": (MATRIX_WITH_MOMENTUM, {"context": 4, "context_mode": "scan"}),
    "scan_constant_decay": (RETNET, {"context": 2, "context_mode": "scan"}),
    "channel_wise_heads": (CHANNEL_WISE, {"context": 2, "context_mode": "heads"}),
    "channel_wise_ring": (CHANNEL_WISE, {"context": 2, "context_mode": "ring"}),
    "tnt_ring": (TNT, {"context": 2, "context_mode": "ring"}),
    "tnt_heads_tensor": (TNT, {"context": 2, "context_mode": "heads", "tensor": 2}),
    "one_head_in_two": (FULL_WIDTH, {"tensor": 2, "sequence": False}),
    "one_head_in_four_sequence_parallel": (FULL_WIDTH, {"tensor": 4}),
    "one_head_in_two_of_two_stages": (FULL_WIDTH, {"tensor": 2, "pipeline": 2}),
    "grouped_queries": (GROUPED, {"tensor": 2, "context": 2}),
    "grouped_queries_full_attention": (dataclasses.replace(GROUPED, variant="transformer"), {"context": 2}),
    "window_in_two_shares": (SWA, {"context": 2}),
    "window_wider_than_a_share": (dataclasses.replace(SWA, window=20), {"context": 4}),
    "window_of_one": (dataclasses.replace(SWA, window=1), {"context": 2}),
    "mac_in_four": (MODELS["mac"], {"context": 4}),
    "data_and_context": (MODELS["mag"], {"context": 2, "data": 2}),
    "data_and_pipeline": (MODELS["mag"], {"pipeline": 2, "data": 2}),
}


FULL_RECOMPUTE = {
    "ring": (MODELS["lmm"], {"context": 2, "context_mode": "ring"}),
    "mac_ring": (MODELS["mac"], {"context": 2}),
    "heads_in_two_stages": (MODELS["mag"], {"context": 2, "context_mode": "heads", "pipeline": 2}),
}


@pytest.mark.parametrize("name", some_marked(FULL_RECOMPUTE, {"mac_ring"}))
def test_working_blocks_out_again_equals_one_process(name: str) -> None:
    model, parallel = FULL_RECOMPUTE[name]
    settings = config(model, **parallel)  # type: ignore[arg-type]
    settings.training.recompute = "full"
    check_layout(settings)


MORE_ALWAYS = {
    *("tied_weights_in_one_stage_of_two_parts", "untied_weights_in_two_stages", "uneven_stages", "heads_in_groups"),
    *("four_scan", "tnt_ring", "one_head_in_two", "grouped_queries", "window_wider_than_a_share", "data_and_context"),
}


@pytest.mark.parametrize("name", some_marked(MORE, MORE_ALWAYS))
def test_more_splits_equal_one_process(name: str) -> None:
    model, parallel = MORE[name]
    check_layout(config(model, **parallel))  # type: ignore[arg-type]


PACKED = {
    "mag_ring": (MODELS["mag"], {"context": 2, "context_mode": "ring"}),
    "mag_heads": (MODELS["mag"], {"context": 2, "context_mode": "heads"}),
    "mal_ring_in_four": (MODELS["mal"], {"context": 4, "context_mode": "ring"}),
    "mac_ring": (MODELS["mac"], {"context": 2}),
    "scan": (MODELS["gated_deltanet"], {"context": 2, "context_mode": "scan"}),
    "transformer": (MODELS["transformer"], {"context": 2}),
    "wide_window": (dataclasses.replace(SWA, window=20), {"context": 4}),
    "tnt": (TNT, {"context": 2, "context_mode": "ring"}),
    "pipeline": (MODELS["mag"], {"pipeline": 2}),
}


@pytest.mark.parametrize("name", some_marked(PACKED, {"mag_ring", "mac_ring", "scan", "wide_window"}))
def test_documents_in_one_row_equal_one_process(name: str) -> None:
    model, parallel = PACKED[name]
    check_layout(config(model, **parallel), packed=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "context_mode"), [("lmm", "ring"), ("lmm", "heads"), ("mac", "ring")])
def test_a_limit_on_the_gradient_of_the_state_is_that_of_the_whole_sequence(
    name: str, context_mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So tight that it acts; every chunk is a group here, so that one process has its borders where two have theirs."""
    monkeypatch.setattr(chunked, "GROUP_TOKENS", 8)
    free = config(variant(name, state_grad_clip=None), context=2, context_mode=context_mode)
    limited = config(variant(name, state_grad_clip=0.05), context=2, context_mode=context_mode)
    gradients = [one_process(settings, False).gradients for settings in (free, limited)]
    name = "blocks.0.mixer.memory.v.weight"
    assert (gradients[0][name] - gradients[1][name]).abs().max() > 1e-3 * gradients[0][name].abs().max()
    check_layout(limited)
