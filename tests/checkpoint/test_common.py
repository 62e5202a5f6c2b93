"""Unsharded values survive JSON bit by bit, or are refused with their place."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from titans_dist.checkpoint.common import read_common, write_common


def test_plain_values_come_back_with_their_types(tmp_path: Path) -> None:
    state = {
        "groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.95), "amsgrad": False, "foreach": None}],
        0: {"nested": [1, (2, [3])]},
        (1, "key"): -0.0,
        "dict": {"tensor": [1], "tuple": (), "dict": {}},
    }
    write_common(tmp_path, state)
    loaded = read_common(tmp_path)
    assert loaded == state
    assert isinstance(loaded["groups"][0]["betas"], tuple)
    assert math.copysign(1, loaded[(1, "key")]) == -1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 5e-324, 1.7976931348623157e308])
def test_extreme_floats_survive(tmp_path: Path, value: float) -> None:
    write_common(tmp_path, {"value": value})
    assert repr(read_common(tmp_path)["value"]) == repr(value)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.0),
        torch.tensor([0.1, 1e-45, 3e38]),
        torch.tensor([[1.0, math.inf]], dtype=torch.bfloat16),
        torch.tensor([2**63 - 1, -(2**63)]),
        torch.tensor([True, False]),
        torch.empty(0, 3),
        torch.tensor([0.1], dtype=torch.float64),
    ],
)
def test_small_tensors_survive_bit_by_bit(tmp_path: Path, tensor: torch.Tensor) -> None:
    write_common(tmp_path, {"tensor": tensor})
    loaded = read_common(tmp_path)["tensor"]
    assert loaded.dtype == tensor.dtype and loaded.shape == tensor.shape
    assert torch.equal(loaded, tensor)


@pytest.mark.parametrize("value", [object(), b"bytes", torch.zeros(2000), {1, 2}])
def test_anything_else_is_refused_with_its_place(tmp_path: Path, value: object) -> None:
    with pytest.raises(TypeError, match=r"the state\.a\[1\]\.b is a \w+"):
        write_common(tmp_path, {"a": [0, {"b": value}]})
