"""Which layouts are legal, without torch: each refusal names what does not fit and a setting that does."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.config.test_validation import TNT, good, put
from titans_dist.config import ConfigError, ParallelConfig, validate
from titans_dist.config.layout import (
    bubble,
    check_world,
    context_groups,
    context_mode,
    describe_layout,
    is_affine,
    parts,
    world_size,
)

ONE_HEAD = {"model__num_heads": 1, "model__variant": "lmm", "parallel__tensor": 2}
REFUSED = [
    ({"parallel__tensor": 3}, "parallel.tensor=3 does not divide model.num_heads=4", "parallel.tensor is 2"),
    (
        {"parallel__pipeline": 5},
        "parallel.pipeline=5 x parallel.virtual=1 is more than model.num_layers=4",
        "at most 4",
    ),
    ({"parallel__virtual": 2}, "parallel.virtual=2 interleaves", "parallel.pipeline=2 or more, or parallel.virtual=1"),
    (
        {"parallel__pipeline": 2, "parallel__layers": [3, 2]},
        "parallel.layers=[3, 2] does not divide model.num_layers=4 into 2 parts",
        "an even split is [2, 2]",
    ),
    ({"parallel__pipeline": 2, "parallel__layers": [4]}, "parallel.layers=[4]", "[2, 2]"),
    ({"parallel__pipeline": 2, "parallel__layers": [4, 0]}, "parallel.layers=[4, 0]", "[2, 2]"),
    (
        {"parallel__pipeline": 2, "parallel__virtual": 2, "training__global_batch_size": 48},
        "takes micro-batches in groups of parallel.pipeline=2, and there are 3",
        "training.global_batch_size=64",
    ),
    (
        {"parallel__context": 3},
        "splits data.sequence_length=256 inside model.memory.chunk_size=64",
        "parallel.context=2",
    ),
    (
        {**TNT, "parallel__context": 2, "model__memory__shard_size": 192},
        "inside model.memory.shard_size=192",
        "data.sequence_length=768 or parallel.context=1",
    ),
    ({"parallel__context": 8}, "splits data.sequence_length=256 inside", "parallel.context=4"),
    (
        {"parallel__context": 2, "model__variant": "mac", "model__segment_length": 256},
        "inside model.segment_length=256",
        "data.sequence_length=512",
    ),
    (
        {
            "parallel__context": 2,
            "model__variant": "mac",
            "model__segment_length": 64,
            "parallel__context_mode": "heads",
        },
        "parallel.context_mode=heads is not offered for model.variant=mac",
        "parallel.context_mode=ring",
    ),
    (
        {"parallel__tensor": 4, "parallel__context": 2, "parallel__context_mode": "heads"},
        "needs parallel.tensor x parallel.context=8 to divide model.num_heads=4",
        "parallel.context=1",
    ),
    ({"parallel__context": 2, "parallel__context_mode": "scan"}, "composes affine maps", "parallel.context_mode=ring"),
    (
        {"parallel__context": 2, "parallel__context_mode": "ring", "model__memory__backend": "triton"},
        "model.memory.backend=triton is not offered with parallel.context_mode=ring",
        "model.memory.backend=auto",
    ),
    ({"parallel__context_mode": "tree"}, "parallel.context_mode=tree is unknown", "auto, heads, ring, scan"),
    (
        {"parallel__context": 2, "training__carry_state": True, "data__documents": "packed"},
        "parallel.context=2 is not possible with training.carry_state=true",
        "parallel.context=1",
    ),
    (
        {"parallel__context": 128, "model__memory__chunk_size": 2},
        "leaves 2 tokens to each process, fewer than a convolution of model.conv_kernel=4",
        "smaller parallel.context",
    ),
    (
        {"parallel__tensor": 4, "model__variant": "swa", "parallel__context": 2, "data__sequence_length": 20},
        "data.sequence_length=20 cannot be split over parallel.tensor=4 x parallel.context=2",
        "parallel.sequence=false",
    ),
    ({**ONE_HEAD, "model__memory__depth": 3}, "not offered with model.memory.depth=3", "model.memory.depth=2"),
    ({**ONE_HEAD, "data__documents": "packed"}, "not offered with data.documents=packed", "data.documents=joined"),
    ({**ONE_HEAD, "parallel__context": 2}, "not offered with parallel.context=2", "parallel.tensor=1"),
    ({**ONE_HEAD, "parallel__tensor": 5}, "does not divide model.hidden_size=192", "parallel.tensor is 4"),
    ({**ONE_HEAD, "model__variant": "mag"}, "parallel.tensor=2 does not divide model.num_heads=1", "is 1"),
    ({"model__num_kv_heads": 3}, "model.num_kv_heads=3 does not divide model.num_heads=4", "is 2"),
    ({"model__num_kv_heads": 2, "model__variant": "mac"}, "not possible with model.variant=mac", "leave it out"),
    ({"model__num_kv_heads": 1, "parallel__tensor": 2}, "does not divide model.num_kv_heads=1", "parallel.tensor is 1"),
    ({"training__engine": "fsdp"}, "training.engine=fsdp is unknown", "megatron, deepspeed"),
    ({"training__zero_stage": 2}, "training.zero_stage=2 needs training.engine=deepspeed", "add that"),
    ({"training__offload": True}, "training.offload=true needs training.engine=deepspeed", "add that"),
    ({"training__zero_stage": 4, "training__engine": "deepspeed"}, "training.zero_stage=4 is unknown", "0, 1, 2 or 3"),
    (
        {"training__engine": "deepspeed", "parallel__pipeline": 2},
        "training.engine=deepspeed is not offered with parallel.pipeline=2",
        "training.engine=megatron",
    ),
    (
        {"training__engine": "deepspeed", "training__offload": True, "training__zero_stage": 0},
        "training.offload=true needs training.zero_stage=1 or more",
        "use 1",
    ),
    ({"training__recompute": "some"}, "training.recompute=some is unknown", "none, selective, full"),
]


@pytest.mark.parametrize(("changes", "what", "mend"), REFUSED, ids=[what for _, what, _ in REFUSED])
def test_what_cannot_be_split_is_refused_with_the_mend(changes: dict[str, Any], what: str, mend: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        validate(put(good(), **changes))
    sentence = str(refusal.value)
    assert what in sentence and mend in sentence[sentence.index(what) :]
    assert "\n" not in sentence


@given(tensor=st.integers(1, 9), context=st.integers(1, 9), mode=st.sampled_from(["heads", "ring", "auto"]))
def test_the_settings_that_a_refusal_proposes_are_accepted(tensor: int, context: int, mode: str) -> None:
    config = put(good(), parallel__tensor=tensor, parallel__context=context, parallel__context_mode=mode)
    for _ in range(4):
        try:
            validate(config)
            return
        except ConfigError as error:
            for key, value in re.findall(r"(?:is|use|or) (?:parallel\.)?(tensor|context)(?:=| is )(\d+)", str(error)):
                setattr(config.parallel, key, int(value))
            if found := re.search(r"nearest legal parallel\.tensor is (\d+)", str(error)):
                config.parallel.tensor = int(found[1])
    validate(config)


def test_no_torch_is_imported() -> None:
    code = "import sys, titans_dist.config.layout; sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(layers=st.integers(1, 40), pipeline=st.integers(1, 5), virtual=st.integers(1, 4))
def test_parts_follow_each_other_and_are_as_even_as_can_be(layers: int, pipeline: int, virtual: int) -> None:
    found = parts(ParallelConfig(pipeline=pipeline, virtual=virtual), layers)
    assert len(found) == pipeline * virtual
    assert [i for part in found for i in part] == list(range(layers))
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_given_layers_are_the_parts() -> None:
    assert parts(ParallelConfig(pipeline=2, layers=[3, 1]), 4) == [range(3), range(3, 4)]


@given(rows=st.integers(1, 12), heads=st.integers(1, 12), ways=st.integers(2, 5), wanted=st.integers(1, 40))
def test_groups_divide_rows_first_and_then_heads(rows: int, heads: int, ways: int, wanted: int) -> None:
    count = context_groups(ParallelConfig(context=ways, context_groups=wanted), rows, heads)
    assert 1 <= count <= max(wanted, 1) and count <= rows * heads
    assert rows % count == 0 or (count % rows == 0 and heads % (count // rows) == 0)


def test_the_bubble_is_what_the_picture_shows() -> None:
    assert bubble(3, 4) == pytest.approx(2 / 6)
    assert bubble(1, 5) == 0


def test_the_mode_that_auto_stands_for() -> None:
    assert context_mode(put(good(), parallel__context=2)) == "heads"
    assert context_mode(put(good(), parallel__context=2, model__variant="mac")) == "ring"
    assert context_mode(put(good(), parallel__context=4, parallel__tensor=2)) == "ring"


@pytest.mark.parametrize(
    ("preset", "affine"),
    [
        ("gated_deltanet", True),
        ("deltanet", True),
        ("mamba2", True),
        ("longhorn", True),
        ("titans", False),
        ("ttt_linear", False),
    ],
)
def test_which_memories_are_affine(preset: str, affine: bool) -> None:
    assert is_affine(put(good(), model__memory__preset=preset).model) == affine


def test_the_processes_of_a_layout() -> None:
    config = put(good(), parallel__tensor=2, parallel__pipeline=2, parallel__context=2)
    assert world_size(config.parallel) == 8
    assert check_world(put(config, training__global_batch_size=32), 16) == 2
    with pytest.raises(ConfigError, match=re.escape("12 processes do not fit parallel.tensor=2 x parallel.pipeline=2")):
        check_world(config, 12)


def test_the_layout_in_words() -> None:
    assert describe_layout(ParallelConfig(), 1) == "tensor 1 x data 1"
    layout = ParallelConfig(tensor=2, pipeline=2, virtual=2, context=4)
    assert describe_layout(layout, 3) == "tensor 2 x context 4 x pipeline 2 of 2 parts x data 3"
