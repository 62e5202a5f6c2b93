"""Does it fit, how fast, what to change."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.plan.models import small
from titans_dist.config import Config, validate
from titans_dist.plan import flops
from titans_dist.plan.estimate import estimate, links, pipeline_bubble
from titans_dist.plan.fit import bound, layouts, nearest, overrides, plan, search, warnings
from titans_dist.plan.hardware import gpu
from titans_dist.plan.report import place_of, rank_map

H100 = gpu("h100")
TIGHT = replace(H100, memory_gb=8.0)


def model(variant: str = "mag", **parallel: int) -> Config:
    """340 million parameters or so, on GPUs."""
    config = small(
        variant, length=2048, rows=8, blocks=12, hidden_size=1024, num_heads=16, vocab_size=32000, precision="bfloat16"
    )
    config.training.device, config.training.global_batch_size, config.model.window = "cuda", 64, 512
    config.model.memory.chunk_size = 64
    return replace(config, parallel=replace(config.parallel, **parallel))  # type: ignore[arg-type]


def test_a_pipeline_waits_as_textbooks_say() -> None:
    config = model(pipeline=4)
    assert pipeline_bubble(config, 8) == pytest.approx(3 / 11)
    assert pipeline_bubble(model(pipeline=4, virtual=2), 8) == pytest.approx(3 / 19)
    assert pipeline_bubble(model(), 8) == 0


def test_a_ring_waits_for_its_groups() -> None:
    config = model(context=4, context_groups=4)
    config.parallel.context_mode = "ring"
    assert estimate(config, 1, H100).ring_bubble == pytest.approx(3 / 7)
    assert estimate(model(context=4), 1, H100).ring_bubble == 0  # by heads


def test_no_estimate_is_faster_than_the_data_sheet() -> None:
    for config in (model(), model("transformer"), model("lmm"), model(tensor=4)):
        found = estimate(config, 1, H100)
        gpus = config.parallel.tensor
        tokens = config.training.global_batch_size * config.data.sequence_length
        assert found.step_s.fast > flops.training(config).total() * tokens / gpus / H100.bfloat16
        assert found.step_s.slow > found.step_s.fast
        assert 0 < found.mfu.slow < found.mfu.fast < 0.75
        assert found.tokens_per_day.fast == pytest.approx(tokens / found.step_s.fast * 86400)


def test_groups_inside_a_node_go_over_its_links() -> None:
    config = model(tensor=8, pipeline=2)
    config.cluster.gpus_per_node = 8
    found = links(config, 2, H100)
    assert {kind: one.is_network for kind, one in found.items()} == {
        "tensor": False, "context": False, "data": True, "pipeline": True
    }  # fmt: skip
    assert found["tensor"].bytes_per_s == H100.link
    assert found["data"].bytes_per_s == H100.network  # one member of each group in a node
    assert links(model(), 16, H100)["data"].bytes_per_s == min(H100.link, 8 * H100.network)


def test_neighbors_in_rank_share_tensors() -> None:
    found = plan(model(tensor=2, pipeline=2), H100, 4)
    assert found.world == 16
    assert [place_of(found, rank)["tensor"] for rank in range(4)] == [0, 1, 0, 1]
    assert [place_of(found, rank)["data"] for rank in (0, 2, 4, 6)] == [0, 1, 2, 3]
    assert [place_of(found, rank)["pipeline"] for rank in (0, 7, 8, 15)] == [0, 0, 1, 1]
    assert [node["pipeline"] for node in rank_map(found)] == [[0, 0], [1, 1]]


def test_what_fits_says_so_and_what_does_not_says_what_is_too_large() -> None:
    assert plan(model(), H100, 1).fits
    found = plan(model(), TIGHT, 1)
    assert not found.fits
    assert bound(found).startswith("memory: ")
    assert "GB of activations" in bound(found)


def test_the_nearest_layout_fits_is_legal_and_changes_least() -> None:
    config = model()
    near = nearest(config, 8, TIGHT)
    assert near is not None
    assert near.fits
    assert near.world == 8
    validate(near.config)
    changed = overrides(config, near.config)
    assert changed
    assert all(word.startswith(("parallel.", "training.")) for word in changed)
    # Nothing nearer fits: one change alone.
    training = replace(config.training, micro_batch_size=4)
    assert len(changed) == 1 or not plan(replace(config, training=training), TIGHT, 8).fits


def test_where_nothing_fits_there_is_no_nearest() -> None:
    assert nearest(model(), 1, replace(H100, memory_gb=1.0)) is None


def test_a_search_lists_legal_layouts_that_fit_the_fastest_first() -> None:
    best = search(model(), 16, TIGHT)
    assert best
    assert all(one.fits and one.world == 16 for one, _ in best)
    middles = [time.step_s.slow * time.step_s.fast for _, time in best]
    assert middles == sorted(middles)
    splits = [
        (one.config.parallel.tensor, one.config.parallel.context, one.config.parallel.pipeline) for one, _ in best
    ]
    assert len(set(splits)) == len(splits)


def test_layouts_are_those_that_training_takes() -> None:
    config = model()
    config.model.num_layers = 6
    found = list(layouts(config, 8, H100))
    assert {one.config.parallel.pipeline for one in found} == {1, 2, 4}
    for one in found:
        validate(one.config)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (model(tensor=16), "parallel.tensor goes over the network"),
        (model("lmm", pipeline=8), "the pipeline waits"),
        (model("lmm", pipeline=8), "the stages have 1 to 2 blocks"),
    ],
)
def test_what_is_probably_not_meant_is_said(config: Config, words: str) -> None:
    assert any(words in warning for warning in warnings(plan(config, H100, 1)))


def test_a_memory_without_kernels_is_said() -> None:
    config = model("lmm")
    assert not any("Triton" in warning for warning in warnings(plan(config, H100, 1)))
    config.model.num_heads = 4  # of 256 dimensions
    assert any("heads of 256 dimensions have none" in warning for warning in warnings(plan(config, H100, 1)))
    assert any("MI300X" in warning for warning in warnings(plan(model("lmm"), gpu("mi300x"), 1)))
