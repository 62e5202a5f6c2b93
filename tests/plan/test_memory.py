"""Bytes of a process: the cases that textbooks work out, and sums over all processes that must be the whole model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.plan.models import small
from titans_dist.config import Config, ConfigError
from titans_dist.config.sizes import parameter_count
from titans_dist.plan.memory import checkpoint_bytes, in_flight, memory_of, workspace
from titans_dist.plan.place import Place


def split(config: Config, **sizes: int) -> Config:
    return replace(config, parallel=replace(config.parallel, **sizes))  # type: ignore[arg-type]


def wide(variant: str = "mag", blocks: int = 8, precision: str = "bfloat16") -> Config:
    config = small(variant, blocks=blocks, hidden_size=1024, num_heads=16, vocab_size=4096, precision=precision)
    config.training.global_batch_size = 64
    return config


@pytest.mark.parametrize(("precision", "state"), [("bfloat16", 12), ("float32", 8)])
def test_a_parameter_takes_its_width_four_bytes_of_gradient_and_a_shared_state(precision: str, state: int) -> None:
    config = wide(precision=precision)
    count = parameter_count(config.model)
    for copies in (1, 8):
        memory = memory_of(config, copies)
        assert memory.parameters == pytest.approx((2 if precision == "bfloat16" else 4) * count, rel=0.001)
        assert memory.gradients == pytest.approx(4 * count, rel=0.001)
        assert memory.optimizer == pytest.approx(state * count / copies, rel=0.001)


@pytest.mark.parametrize("variant", ["mag", "mac", "lmm", "mal", "transformer", "deltanet"])
def test_all_stages_together_hold_the_whole_model(variant: str) -> None:
    config = wide(variant)
    config.model.tie_embeddings = False
    stages = split(config, pipeline=4)
    held = sum(memory_of(stages, 1, stage).parameters for stage in range(4)) / 2
    assert held == pytest.approx(parameter_count(config.model), rel=0.001)


def test_tensor_parallel_processes_hold_a_share_each() -> None:
    config = wide()
    whole, half = memory_of(config, 1), memory_of(split(config, tensor=2), 1)
    assert half.parameters == pytest.approx(whole.parameters / 2, rel=0.01)
    assert half.states * 2 == whole.states
    assert half.activations == pytest.approx(whole.activations / 2, rel=0.35)  # a region's input is whole
    assert half.logits == pytest.approx(whole.logits / 2, rel=0.2)


def test_sequence_parallelism_splits_what_is_between_regions() -> None:
    config = split(wide(), tensor=4)
    together, apart = memory_of(config, 1), memory_of(split(config, sequence=False), 1)
    assert together.activations < apart.activations
    assert together.parameters == apart.parameters


def test_a_shorter_share_of_the_sequence_keeps_less() -> None:
    config = wide("lmm")
    config.data.sequence_length = 8192
    whole, share = memory_of(config, 1), memory_of(split(config, context=8), 1)
    assert share.activations == pytest.approx(whole.activations / 8, rel=0.01)
    assert share.optimizer * 8 == pytest.approx(whole.optimizer, rel=0.001)  # shares are copies of the model


def test_a_ring_keeps_the_state_it_hands_on_and_heads_share_the_states_out() -> None:
    config = wide("lmm", blocks=1)
    config.data.sequence_length = 2048
    one = memory_of(config, 1)
    ring, heads = split(config, context=2), split(config, context=2)
    ring.parallel.context_mode, heads.parallel.context_mode = "ring", "heads"
    state = Place(config, 1, 0, 0).state
    begins = one.states - 4 * state  # four groups
    assert begins == state // 2  # the learned weights of one of two rows in float32
    assert memory_of(heads, 1).states - begins == 4 * state // 2
    assert memory_of(ring, 1, 0, 1).states - begins == (2 + 1) * state
    assert memory_of(ring, 1).states - begins == 2 * state + state // 2  # nobody has handed it more than one row


def test_full_recompute_keeps_what_goes_round_a_ring() -> None:
    config = split(wide("lmm"), context=2)
    config.training.recompute, config.parallel.context_mode = "full", "heads"
    by_heads = memory_of(config, 1)
    config.parallel.context_mode = "ring"
    assert memory_of(config, 1).activations > by_heads.activations


def test_1f1b_has_as_many_micro_batches_in_flight_as_there_are_stages_from_here_on() -> None:
    config = split(wide(), pipeline=4)
    assert [in_flight(Place(config, 1, stage, 0)) for stage in range(4)] == [[4], [3], [2], [1]]
    config.training.global_batch_size = 2 * config.training.micro_batch_size
    assert [in_flight(Place(config, 1, stage, 0)) for stage in range(4)] == [[2], [2], [2], [1]]


def test_interleaved_stages_have_more_in_flight_in_parts_that_hold_less() -> None:
    config = split(wide(), pipeline=4, virtual=2)
    counts = [in_flight(Place(config, 1, stage, 0)) for stage in range(4)]
    assert [sum(count) for count in counts] == [11, 9, 7, 5]  # 2 (P - 1 - s) + (V - 1) P + 1
    assert counts[0] == [7, 4]


def test_only_the_last_stage_has_logits() -> None:
    config = split(wide(), pipeline=4)
    config.model.vocab_size = 32768
    logits = [memory_of(config, 1, stage).logits for stage in range(4)]
    assert logits[:3] == [0, 0, 0]
    assert logits[3] == pytest.approx(2 * 256 * 32768 * (4 + 2), rel=0.07)  # and the norm before them


def test_recompute_trades_activations() -> None:
    kept, states, blocks = (
        memory_of(replace(wide(), training=replace(wide().training, recompute=what)), 1).activations
        for what in ("none", "selective", "full")
    )
    assert kept > states > blocks
    full = replace(wide("swa"), training=replace(wide().training, recompute="full"))
    assert workspace(full, 1) >= memory_of(wide("swa"), 1).activations / 10  # one of eight blocks at a time


@pytest.mark.parametrize(("stage", "bytes_each"), [(0, 2 + 4 + 12), (1, 2 + 4 + 3), (2, 2 + 1 + 3), (3, 0.5 + 1 + 3)])
def test_zero_stages_over_four_copies(stage: int, bytes_each: float) -> None:
    config = wide()
    config.training.engine, config.training.zero_stage = "deepspeed", stage
    memory = memory_of(config, 4)
    held = memory.parameters + memory.gradients + memory.optimizer
    assert held == pytest.approx(bytes_each * parameter_count(config.model), rel=0.001)


def test_a_checkpoint_has_parameters_moments_and_main_weights() -> None:
    assert checkpoint_bytes(wide()) == 14 * parameter_count(wide().model)
    assert checkpoint_bytes(wide(precision="float32")) == 12 * parameter_count(wide().model)


def test_a_memory_of_one_head_over_several_processes_is_not_worked_out() -> None:
    config = split(small("lmm", hidden_size=64, num_heads=1), tensor=2)
    with pytest.raises(ConfigError, match=r"parallel\.tensor=2 holds of a memory of model\.num_heads=1 is not worked"):
        memory_of(config, 1)
