"""Tensor parallelism computes the same function: outputs and every gradient, in float64."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from tests.distributed import run_distributed
from titans_dist.config import MemoryConfig, ModelConfig
from titans_dist.model import LanguageModel, build_model

SMALL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    vocab_size=64,
    window=6,
    persistent_tokens=4,
    memory=MemoryConfig(expansion=2, chunk_size=8),
)
MODELS = {
    "mag": SMALL,
    "untied_without_persistent": dataclasses.replace(SMALL, tie_embeddings=False, persistent_tokens=0),
    "deep_plain": dataclasses.replace(SMALL, memory=MemoryConfig(depth=3, residual=False, momentum=False)),
}
ONE = dataclasses.replace(SMALL, num_layers=1)
OTHERS = {
    "lmm": dataclasses.replace(ONE, variant="lmm"),
    "mal": dataclasses.replace(ONE, variant="mal"),
    "mac": dataclasses.replace(ONE, variant="mac", segment_length=8),
    "swa": dataclasses.replace(ONE, variant="swa"),
    "tnt": dataclasses.replace(
        ONE, variant="lmm", memory=MemoryConfig(chunk_size=2, global_chunk_size=4, shard_size=8)
    ),
    "channel_wise": dataclasses.replace(ONE, memory=MemoryConfig(preset="yaad", channel_wise=True, gate_rank=3)),
    "retnet": dataclasses.replace(ONE, variant="lmm", memory=MemoryConfig(preset="retnet", chunk_size=8)),
}
CASES = [(name, world) for name in MODELS for world in (2, 4)] + [(name, 2) for name in OTHERS]


def compare(rank: int, world: int, config: ModelConfig, sequence: bool) -> tuple[float, float, dict[str, int]]:
    """Largest differences of logits and (relative to each parameter's largest) of gradients; collectives by name."""
    import torch.distributed as dist
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region, mappings

    from titans_dist.parallel import cpu
    from titans_dist.parallel.tensor import build_parallel

    cpu.install()
    parallel_state.initialize_model_parallel(world)
    with torch.device("meta"):
        model = LanguageModel(config)
    parallel = ModelParallelConfig(
        tensor_model_parallel_size=world,
        sequence_parallel=sequence,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
    )
    build_parallel(model, parallel, parallel_state.get_tensor_model_parallel_group(), seed=5)
    model.double()
    whole = build_model(config, seed=5).double()
    x = torch.randint(0, config.vocab_size, (3, 25), generator=torch.Generator().manual_seed(1))
    wanted = whole(x[:, :-1])
    F.cross_entropy(wanted.flatten(0, 1), x[:, 1:].flatten()).backward()
    with (
        mock.patch.object(mappings, "dist_all_gather_func", wraps=mappings.dist_all_gather_func) as gathers,
        mock.patch.object(mappings, "dist_reduce_scatter_func", wraps=mappings.dist_reduce_scatter_func) as scatters,
        mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduces,
    ):
        found = gather_from_tensor_model_parallel_region(model(x[:, :-1]))
        F.cross_entropy(found.flatten(0, 1), x[:, 1:].flatten()).backward()
        counts = {"gather": gathers.call_count, "scatter": scatters.call_count, "reduce": reduces.call_count}

    worst = 0.0
    parameters = dict(whole.named_parameters())
    for name, value in model.named_parameters():
        grad, whole_grad = value.grad, parameters[name].grad
        assert grad is not None and whole_grad is not None, name
        if getattr(value, "sequence_parallel", False):
            dist.all_reduce(grad)  # what finalize_model_grads does
        if value.tensor_model_parallel:  # type: ignore[attr-defined]
            whole_grad = whole_grad.chunk(world, value.partition_dim)[rank]  # type: ignore[attr-defined]
        worst = max(worst, ((grad - whole_grad).abs().max() / whole_grad.abs().max()).item())
    return (found - wanted).abs().max().item(), worst, counts


@pytest.mark.parametrize("sequence", [True, False], ids=["sequence_parallel", "plain"])
@pytest.mark.parametrize(("name", "world"), CASES)
def test_logits_and_gradients_equal_one_process(name: str, world: int, sequence: bool) -> None:
    for logits, gradients, _ in run_distributed(compare, world, (MODELS | OTHERS)[name], sequence):
        assert logits < 1e-9
        assert gradients < 1e-9


def test_each_sub_block_costs_two_collectives_each_way() -> None:
    blocks = 2 * SMALL.num_layers
    _, _, sequence = run_distributed(compare, 2, SMALL, True)[0]
    # Forward: a gather into each sub-block and the head, a scatter out of each sub-block and the embedding.
    # Backward: the same with the two exchanged. One more gather for this test's own logits.
    assert sequence == {"gather": (blocks + 1) + (blocks + 1) + 1, "scatter": (blocks + 1) + (blocks + 1), "reduce": 0}
    _, _, plain = run_distributed(compare, 2, SMALL, False)[0]
    # An all-reduce instead of each pair; the persistent tokens of each layer sum their small gradient by themselves.
    assert plain == {"gather": 1, "scatter": 0, "reduce": (blocks + 1) + (blocks + 1) + SMALL.num_layers}


def test_no_rank_holds_more_than_its_part() -> None:
    def count(rank: int, world: int) -> int:
        from megatron.core import ModelParallelConfig, parallel_state

        from titans_dist.parallel.tensor import build_parallel

        parallel_state.initialize_model_parallel(world)
        with torch.device("meta"):
            model = LanguageModel(SMALL)
        config: Any = ModelParallelConfig(
            tensor_model_parallel_size=world, use_cpu_initialization=True, perform_initialization=False
        )
        build_parallel(model, config, parallel_state.get_tensor_model_parallel_group(), seed=0)
        return sum(value.numel() for value in model.parameters())

    whole = sum(value.numel() for value in build_model(SMALL).parameters())
    replicated = (2 * SMALL.num_layers + 1 + SMALL.num_layers * SMALL.persistent_tokens) * SMALL.hidden_size
    assert run_distributed(count, 4) == [replicated + (whole - replicated) // 4] * 4
