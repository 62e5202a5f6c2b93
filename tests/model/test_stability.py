"""Every variant and every memory stays finite: at every depth, in both types, on hostile inputs, over long sequences.

The cases, and what makes an input hostile, are those of benchmarks/stability.py, which tries them at full length.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


def load() -> ModuleType:
    """benchmarks/stability.py, which lies in no package."""
    spec = importlib.util.spec_from_file_location("stability", ROOT / "benchmarks" / "stability.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["stability"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


stability = load()

MODELS: list[tuple[str, int | None]] = [
    *((name, None) for name in stability.everything()),
    *itertools.product(["lmm:titans"], [1, 2, 3, 4]),
    *itertools.product(["mac", "mag", "mal", "lmm:moneta", "lmm:yaad", "lmm:memora", "lmm:ttt_mlp"], [1, 4]),
]


def outcomes(name: str, depth: int | None, dtype: str, inputs: list[str], length: int, steps: int) -> dict[str, Any]:
    """Inputs -> what is wrong, for those where something is."""
    found = {}
    for case in stability.cases([name], [depth], inputs, [dtype]):
        outcome = stability.train(stability.model(case, 16, 64), case, length, steps, lr=3e-3)
        if outcome.trouble is not None:
            found[case.inputs] = outcome.trouble
        else:
            assert outcome.steps == steps and all(map(math.isfinite, outcome.losses))
    return found


@pytest.mark.parametrize("dtype", stability.DTYPES)
@pytest.mark.parametrize(("name", "depth"), MODELS, ids=lambda value: str(value))
def test_losses_and_gradients_are_finite_on_every_input(name: str, depth: int | None, dtype: str) -> None:
    # Longer than a group of chunks, and not a whole number of chunks.
    assert outcomes(name, depth, dtype, list(stability.INPUTS), length=600, steps=2) == {}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", stability.DTYPES)
@pytest.mark.parametrize(("name", "depth"), [("lmm:titans", 4), ("mac", 2), ("lmm:moneta", 2)])
def test_a_long_sequence_stays_finite(name: str, depth: int, dtype: str) -> None:
    assert outcomes(name, depth, dtype, ["random", "constant"], length=16384, steps=2) == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "constant"])
def test_two_hundred_steps_of_the_deepest_memory_stay_finite(kind: str) -> None:
    assert outcomes("lmm:titans", 4, "float32", [kind], length=512, steps=200) == {}


def test_what_is_not_finite_is_seen_and_named() -> None:
    case = stability.Case("lmm", "titans", 2, "random", "float32")
    net = stability.model(case, 16, 64)
    with torch.no_grad():
        net.blocks[0].mixer.memory.memory.weights[1][0, 0, 0] = math.inf
    outcome = stability.train(net, case, 100, 3, lr=1e-3)
    assert outcome.trouble == "step 1: loss nan, from blocks.0.mixer.memory"

    net = stability.model(case, 16, 64)
    net.blocks[0].mlp.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * math.inf,))
    outcome = stability.train(net, case, 100, 3, lr=1e-3)
    assert outcome.trouble.startswith("step 1: gradient of blocks.0.mlp_norm.weight and ")
