"""benchmarks/gpu.py runs from end to end without a GPU, in miniature: on one it must not fail for its own mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LACKING = ("omegaconf", "hydra", "megatron", "titans_pytorch", "fla", "fla_core", "titans_dist", "__editable__")
"""What a machine may be without that has Python, torch and triton."""


def gpu(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(["-S"] if environment else []), str(BENCHMARKS / "gpu.py"), *options]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=280, cwd="/", env={**os.environ, **environment}
    )


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_correctness
    import gpu_machine

    return SimpleNamespace(correctness=gpu_correctness, machine=gpu_machine)


def results(folder: Path) -> dict:
    (path,) = folder.glob("gpu-cpu-*.json")
    return json.loads(path.read_text())


def test_all_subjects_in_miniature(tmp_path):
    done = gpu("--device", "cpu", "--tiny", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    found = results(tmp_path)
    assert set(found["machine"]) >= {"date", "card", "driver", "torch", "triton", "commit"}
    assert all(row["passed"] and row["deterministic"] for row in found["correctness"])
    assert len(found["correctness"]) == 24
    assert found["ceilings"]["matmul_flops_per_s"] > 0
    by_rival = {row["rival"]: row for row in found["operator"] if row["expansion"] == 4}
    assert by_rival["operator, torch"]["share"] > 0
    assert by_rival["layer, titans-pytorch"]["tokens_per_s"] > 0
    assert "error" in by_rival["operator, fla gated delta rule"]
    assert found["kernels"][0]["seconds"] > 0
    assert {(row["model"], "error" in row) for row in found["steps"]} == {
        (model, False) for model in ("lmm", "mag", "transformer", "swa")
    }
    verdicts = {row["target"]: row["met"] for row in found["targets"]}
    assert verdicts["operator / fla's gated delta rule, expansion 4"] == "not measured"
    assert len(verdicts) == 10


def test_python_torch_and_triton_are_enough(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    for entry in Path(torch.__file__).parents[1].iterdir():
        if not entry.name.startswith(LACKING):
            (site / entry.name).symlink_to(entry)
    done = gpu("--device", "cpu", "--tiny", "--output", str(tmp_path), PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr[-2000:]
    found = results(tmp_path)
    reasons = {row["error"] for row in found["operator"] + found["steps"] if "error" in row}
    assert reasons == {f"{name} is not installed" for name in ("fla", "titans_pytorch", "megatron")}
    assert all(row["passed"] for row in found["correctness"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = gpu()
    assert done.returncode == 2
    assert done.stdout.startswith("There is no CUDA device: ")


def test_a_wrong_kernel_fails(modules, monkeypatch):
    settings = modules.machine.Settings("cpu", quick=False, tiny=True, seed=1, ends=time.monotonic() + 60)
    right = modules.correctness.neural_memory

    def wrong(*args, **kwargs):
        y, state = right(*args, **kwargs)
        return (y if kwargs["backend"] == "recurrent" else y * 1.1), state

    monkeypatch.setattr(modules.correctness, "neural_memory", wrong)
    rows = modules.correctness.correctness(settings)
    assert not any(row["passed"] for row in rows)
    assert all(abs(row["errors"]["y"] - 0.1) < 0.01 for row in rows)


def test_nothing_that_is_not_a_number_passes(modules, monkeypatch):
    settings = modules.machine.Settings("cpu", quick=False, tiny=True, seed=1, ends=time.monotonic() + 60)
    right = modules.correctness.neural_memory

    def wrong(*args, **kwargs):
        y, state = right(*args, **kwargs)
        return (y if kwargs["backend"] == "recurrent" else y * float("nan")), state

    monkeypatch.setattr(modules.correctness, "neural_memory", wrong)
    assert not any(row["passed"] for row in modules.correctness.correctness(settings))


def test_every_choice_is_checked_on_a_gpu(modules):
    settings = modules.machine.Settings("cuda", quick=False, tiny=False, seed=1, ends=0)
    cases = modules.correctness.cases(settings)
    assert len({case for case in cases}) == len(cases) == 78
    for name, values in {
        "depth": {1, 2},
        "expansion": {1, 2, 4},
        "head_dim": {64, 96, 128},
        "chunk_size": {16, 32, 64, 128},
        "bias": {"l2", "dot", "huber"},
        "read": {"after", "before"},
        "state": {"none", "between", "inside"},
        "momentum": {True, False},
        "residual": {True, False},
        "documents": {True, False},
        "is_odd": {True, False},
        "in_registers": {True, False},
        "dtype": {"float32", "bfloat16"},
    }.items():
        assert {getattr(case, name) for case in cases} == values


def test_cases_run_in_processes_of_their_own_and_end_in_time(modules):
    check = modules.correctness.Check(modules.correctness.Case(expansion=1, head_dim=4, chunk_size=2), "cpu", "torch",
                                      "recurrent", 1)  # fmt: skip
    ((_, row),) = modules.machine.in_processes(modules.correctness.run, [check], 1, 200)
    assert row["passed"]
    ((_, row),) = modules.machine.in_processes(modules.correctness.run, [check], 1, 0)
    assert row == {"error": "not done in time"}
