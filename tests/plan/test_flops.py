"""Operations by formula are those that torch's counter sees in the real model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.plan.models import small
from titans_dist.config.sizes import parameter_count
from titans_dist.model import build_model
from titans_dist.plan import flops

aten = torch.ops.aten


def attention(q: Any, k: Any, v: Any, dropout: float = 0.0, is_causal: bool = False, **_: Any) -> int:
    """Scores and their product with the values; of causal attention what is seen."""
    batch, heads, queries, dim = q
    seen = queries * (queries + 1) // 2 if is_causal else queries * k[2]
    return int(4 * batch * heads * seen * dim)


def attention_backward(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, p: float, causal: bool, **_: Any) -> int:
    """Twice as much: that the kernel works the scores out again is not counted."""
    return 2 * attention(q, k, v, is_causal=causal)


def added_product(x: Any, a: Any, b: Any, **_: Any) -> int:
    return int(2 * a[0] * a[1] * a[2] * b[2])


MAPPING = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    aten.baddbmm_: added_product,
}


def counted(case: dict[str, Any]) -> tuple[float, float]:
    """FLOPs of a token, forward and backward, but for the gates' products of chunk by chunk by chunk."""
    config = small(**case, recompute="none")
    model = build_model(config.model)
    model.set_recompute("none")
    rows, length = config.training.micro_batch_size, config.data.sequence_length
    with FlopCounterMode(display=False, custom_mapping=MAPPING) as counter:
        logits = model(torch.zeros(rows, length, dtype=torch.int64))
        forward = counter.get_total_flops()
        logits.sum().backward()
    both = counter.get_total_flops()
    return forward / rows / length, (both - forward) / rows / length


@pytest.mark.parametrize(
    "case",
    [
        *({"variant": v} for v in ("lmm", "mac", "mag", "mal", "swa", "transformer", "mamba2", "deltanet")),
        {"variant": "swa", "num_kv_heads": 2},
        {"variant": "lmm", "memory_depth": 3},
        {"variant": "lmm", "memory_expansion": 1},
        {"variant": "lmm", "memory_preset": "moneta"},
        {"variant": "lmm", "memory_preset": "yaad"},
        {"variant": "lmm", "memory_channel_wise": False, "blocks": 2},
    ],
    ids=lambda case: "-".join(map(str, case.values())),
)
def test_the_formula_counts_what_the_model_does(case: dict[str, Any]) -> None:
    config = small(**case, recompute="none")
    forward, backward = counted(case)
    planned = flops._forward(config, is_performed=True)
    assert planned.total() == pytest.approx(forward, rel=0.04)
    assert flops._backward(config, planned).total() == pytest.approx(backward, rel=0.05)


def test_a_transformer_takes_six_operations_per_parameter_and_token() -> None:
    config = small("transformer", length=2, hidden_size=512, num_heads=8, blocks=12)
    matrices = parameter_count(config.model)  # the tied embedding is the head's product
    assert flops.training(config).matmul == pytest.approx(6 * matrices, rel=0.01)


def test_attention_counts_the_keys_that_are_seen() -> None:
    full, window = small("transformer", length=4096), small("swa", length=4096)
    full.model.persistent_tokens = window.model.persistent_tokens = 0
    assert flops.forward(full).attention == pytest.approx(4 * 128 * (4096 + 1) / 2)
    assert flops.forward(window).attention == pytest.approx(4 * 128 * 48, rel=0.01)
    assert flops.performed(window).attention == pytest.approx(3 * 4 * 128 * 96, rel=0.01)  # blocks of two windows


def test_what_is_worked_out_again_is_computed_but_is_no_use() -> None:
    kept, again, whole = (small("mag", recompute=what) for what in ("none", "selective", "full"))
    assert flops.training(kept) == flops.training(again) == flops.training(whole)
    once = flops.forward(kept).memory
    assert flops.performed(again).memory - flops.performed(kept).memory == pytest.approx(once)
    assert flops.performed(whole).total() > flops.performed(again).total()
