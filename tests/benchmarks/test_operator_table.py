"""benchmarks/operator.py runs, in miniature, with every peer that it compares with, and compares equal sizes."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "operator.py"


def output(*options: str) -> str:
    """What the program prints for tiny sizes."""
    sizes = ["--batch", "1", "--length", "32", "--heads", "2", "--head-dim", "8", "--chunk-size", "8", "--runs", "1"]
    command = [sys.executable, str(PROGRAM), *sizes, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "is not installed" not in done.stdout
    return done.stdout


def test_it_prints_its_three_tables() -> None:
    printed = output("--lengths", "64")
    for row in (
        "titans_dist",
        "titans_dist, backend=compiled",
        "titans-pytorch, exact mode",
        "token by token",
        "fla gated delta reference",
    ):
        assert row in printed
    assert "states recomputed" in printed


@pytest.mark.slow
def test_whole_steps_take_turns_with_their_peers() -> None:
    printed = output("--peers", "--layers", "1", "--segment", "16", "--vocabulary", "16")
    for row in (
        "Memory layer, forward + backward",
        "titans_dist lmm, backend=compiled",
        "titans-pytorch's memory, exact mode",
        "titans-pytorch's memory, as it comes",
        "titans_dist mac, backend=compiled",
        "titans-pytorch MAC, exact mode",
        "titans-pytorch MAC, as it comes",
    ):
        assert row in printed
    assert "token by token" not in printed and "states recomputed" not in printed


def test_rivals_are_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell around titans-pytorch's memory is ours, and the networks learn about as many numbers."""
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    import whole_step

    args = argparse.Namespace(
        heads=4, head_dim=32, depth=2, expansion=4, chunk_size=16, layers=2, segment=128, vocabulary=256,
        device="cpu", recompute=False,
    )  # fmt: skip

    def trained(model: nn.Module) -> int:
        tokens = torch.randint(args.vocabulary, (1, 128))
        model(tokens).square().mean().backward()
        used = {name: p.numel() for name, p in model.named_parameters() if p.grad is not None}
        return sum(size for name, size in used.items() if "axial_pos_emb" not in name)  # a table of positions

    shell, alone = (whole_step.ours(args, "lmm"), whole_step.with_their_memory(args, exact=True))
    names = {name for name, _ in shell.named_parameters() if ".mixer." not in name}
    assert names == {name for name, _ in alone.named_parameters() if ".mixer." not in name}
    assert 1 <= trained(shell) / trained(alone) < 1.1
    assert 1 <= trained(whole_step.ours(args, "mac")) / trained(whole_step.their_mac(args, exact=True)) < 1.2
