"""The recall experiment: its task is what it says, and it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from titans_dist.model import build_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def recall_task(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import recall_task

    return recall_task


def test_every_query_asks_for_the_value_that_stood_beside_its_key(recall_task):
    task = recall_task.Task()
    tokens, values = task.batch(50, torch.Generator().manual_seed(1))
    assert tokens.shape == (50, task.length) and values.shape == (50, task.queries)
    for row, answers in zip(tokens.tolist(), values.tolist(), strict=True):
        shown = row[: 2 * task.pairs]
        beside = dict(zip(shown[::2], shown[1::2], strict=True))
        assert len(beside) == task.pairs
        asked = row[-task.queries :]
        assert answers == [beside[key] for key in asked]
        assert sorted(asked) == sorted(list(beside) * task.rounds)


def test_no_value_and_no_key_stands_between_the_pairs_and_the_queries(recall_task):
    task = recall_task.Task()
    tokens, values = task.batch(50, torch.Generator().manual_seed(2))
    first_noise, first_query = 2 * task.pairs, task.length - task.queries
    assert tokens[:, first_noise:first_query].min() >= task.keys + task.values
    assert tokens[:, first_query:].max() < task.keys
    assert values.min() >= task.keys and values.max() < task.keys + task.values
    assert tokens.max() < task.vocab_size


def test_pairs_are_new_in_every_sequence_and_values_independent_of_each_other(recall_task):
    task = recall_task.Task()
    tokens, values = task.batch(4000, torch.Generator().manual_seed(3))
    for seen in (tokens[:, 0:16:2] / task.keys, (tokens[:, 1:16:2] - task.keys) / task.values):
        assert (seen.float().mean(0) - 7.5 / 16).abs().max() < 0.02
    counts = torch.bincount(values.flatten(), minlength=task.vocab_size)[task.keys : task.keys + task.values]
    assert (counts / counts.sum() / task.chance - 1).abs().max() < 0.1
    # Drawn with replacement: who has seen seven values knows nothing of the eighth.
    same = (tokens[:, 1] == tokens[:, 3]).float().mean().item()
    assert abs(same - task.chance) < 0.015


def test_no_model_without_memory_sees_a_pair_from_a_query(recall_task):
    """By perturbation, with weights at random: what a model without a carried state can see ends after the pairs."""
    task = recall_task.Task()
    farthest_seen = task.length - task.queries - recall_task.reach()
    last_of_the_pairs = 2 * task.pairs - 1
    assert last_of_the_pairs < farthest_seen
    tokens, _ = task.batch(2, torch.Generator().manual_seed(4))
    other = tokens.clone()
    other[:, : 2 * task.pairs] = task.batch(2, torch.Generator().manual_seed(5))[0][:, : 2 * task.pairs]
    for variant, sees in (("swa", False), ("transformer", True), ("lmm", True)):
        model = build_model(recall_task.model_config(variant, task))
        with torch.no_grad():
            a, b = (model(x)[:, -task.queries :] for x in (tokens, other))
        assert torch.equal(a, b) != sees, variant


def test_a_memory_that_never_changes_sees_no_pair_either(recall_task):
    """The windows, segments and convolutions of the hybrids alone do not reach from a query to a pair."""
    task = recall_task.Task()
    tokens, _ = task.batch(2, torch.Generator().manual_seed(4))
    other = tokens.clone()
    other[:, : 2 * task.pairs] = task.batch(2, torch.Generator().manual_seed(5))[0][:, : 2 * task.pairs]
    for variant in ("lmm", "mac", "mag", "mal"):
        model = build_model(recall_task.model_config(variant, task))
        for name, parameter in model.named_parameters():
            if name.endswith(("alpha.map.bias", "theta.map.bias")):
                parameter.data.fill_(-200.0)  # nothing is ever written or forgotten
        with torch.no_grad():
            a, b = (model(x)[:, -task.queries :] for x in (tokens, other))
        assert torch.equal(a, b), variant


def test_parameters_are_equal(recall_task):
    task = recall_task.Task()
    counts = {
        name: sum(p.numel() for p in build_model(recall_task.model_config(name, task)).parameters())
        for name in recall_task.MODELS
    }
    assert set(counts) == {"lmm", "mac", "mag", "mal", "gated_deltanet", "transformer", "swa"}
    assert max(counts.values()) < 1.02 * min(counts.values()), counts


def test_runs_in_miniature_twice_the_same(tmp_path):
    results = []
    for name in ("a", "b"):
        command = [sys.executable, BENCHMARKS / "recall.py", "--models", "swa,gated_deltanet", "--seeds", "1"]
        command += ["--steps", "4", "--workers", "2", "--out", tmp_path / name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        assert "Gated DeltaNet" in done.stdout and "chance" in done.stdout
        results.append(json.loads((tmp_path / name / "recall.json").read_text()))
    assert (tmp_path / "a" / "recall.png").stat().st_size > 1000
    table = (tmp_path / "a" / "recall.md").read_text()
    assert "| SWA only, the control |" in table and "| chance | 6.2% |" in table
    for first, second in zip(*(result["runs"] for result in results), strict=True):
        assert first["tokens"] == 4 * 32 * 64
        assert first["curve"] == second["curve"] and first["accuracy"] == second["accuracy"]


def test_an_unknown_model_is_refused():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "recall.py", "--models", "lmm,rnn"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "--models rnn is unknown; choose from lmm, mac" in done.stderr
