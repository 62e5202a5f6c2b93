"""Weights & Biases: real offline runs, and every way it fails leaves training alone."""

from __future__ import annotations

import itertools
import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from titans_dist.config import Config, DataConfig
from titans_dist.tracking import StepRow, Tracker, losses

SECRET = "0123456789abcdef0123456789abcdef01234567"


def row(step: int) -> StepRow:
    return StepRow(step, 8.0 / step, 1.0, 1e-3, 4096 * step, 1e4, 0.1, 0.0, 1 << 30)


@pytest.fixture
def config() -> Config:
    config = Config(name="demo", run_dir="unused", data=DataConfig(format="synthetic", path=""))
    config.tracking.wandb = True
    return config


def records(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    data = file.read_bytes()
    assert data.startswith(b":W&B")
    position, parts = 7, b""
    while position + 7 <= len(data):
        if 2**15 - position % 2**15 < 7:  # no header fits: zeros up to the next block
            position += 2**15 - position % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # full, or last of several
            yield parts
            parts = b""


def read_offline(run_dir: Path, run_id: str) -> tuple[list[dict[str, str]], list[Any], set[str]]:
    """History rows, metric definitions and configuration keys of the offline runs of this id."""
    from wandb.proto import wandb_internal_pb2

    rows, metrics, keys = [], [], set()
    files = sorted((run_dir / "wandb").glob(f"offline-run-*-{run_id}*/run-{run_id}.wandb"))
    assert files
    for data in itertools.chain.from_iterable(map(records, files)):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            rows.append({item.key or ".".join(item.nested_key): item.value_json for item in record.history.item})
        elif kind == "metric":
            metrics.append(record.metric)
        elif kind == "run":
            keys |= {item.key for item in record.run.config.update}
    return rows, metrics, keys


def test_an_offline_run_goes_on_under_its_id_after_a_restart(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    first = Tracker(tmp_path, config)
    run_id = first.wandb_id
    assert run_id
    first.step(row(1))
    first.step(row(2))
    first.close()

    second = Tracker(tmp_path, config, resumed_step=2, wandb_id=run_id)
    assert second.wandb_id == run_id
    second.step(row(3))
    second.evaluation({"loss": 2.0, "checkpoint": "a path"})
    gate, spoiled = ({"low": 0.0, "high": high, "counts": [1, 3]} for high in (0.5, float("nan")))
    second.memories(3, {"blocks.0": {"w_norm": 7.0, "s_norm": None, "alpha": gate, "eta": None, "theta": spoiled}})
    second.close()

    deadline = time.monotonic() + 20
    while len((found := read_offline(tmp_path, run_id))[0]) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)  # wandb's service writes the last records of an offline run after `finish` has returned
    rows, metrics, keys = found
    assert [float(found["train/loss"]) for found in rows if "train/loss" in found] == [8.0, 4.0, 8 / 3]
    assert [int(found["tokens"]) for found in rows] == [4096, 8192, 12288, 12288, 12288]
    assert [float(found["evaluation/loss"]) for found in rows if "evaluation/loss" in found] == [2.0]
    (memory,) = [found for found in rows if "memory/blocks.0/w_norm" in found]
    assert float(memory["memory/blocks.0/w_norm"]) == 7.0
    assert "memory/blocks.0/s_norm" not in memory
    histogram = {key: json.loads(memory[f"memory/blocks.0/alpha.{key}"]) for key in ("_type", "bins", "values")}
    assert histogram == {"_type": "histogram", "bins": [0.0, 0.25, 0.5], "values": [1, 3]}
    assert any(metric.glob_name == "*" and metric.step_metric == "tokens" for metric in metrics)
    assert {"model", "training", "optimizer"} <= keys
    assert losses(tmp_path / "metrics.jsonl") == {1: 8.0, 2: 4.0, 3: 8 / 3}
    assert capfd.readouterr().err == ""
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes()


class FakeRun:
    id = "fake"

    def __init__(self, failing: str) -> None:
        self.failing = failing

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> None:
            if name == self.failing:
                raise RuntimeError("the service\nis gone")

        return call


def fake_wandb(failing: str) -> ModuleType:
    module = ModuleType("wandb")
    module.Settings = dict  # type: ignore[attr-defined]

    def init(**kwargs: Any) -> FakeRun:
        if failing == "init":
            raise TimeoutError("no answer within 60 s")
        if failing == "exit":
            raise SystemExit(1)
        return FakeRun(failing)

    module.init = init  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize(
    ("failing", "sentence"),
    [
        ("import", "wandb could not start (ModuleNotFoundError: "),
        ("init", "wandb could not start (TimeoutError: no answer within 60 s)"),
        ("exit", "wandb could not start (SystemExit: 1)"),
        ("define_metric", "wandb could not start (RuntimeError: the service)"),
        ("log", "wandb could not log (RuntimeError: the service)"),
        ("finish", "wandb could not finish (RuntimeError: the service)"),
    ],
)
def test_whatever_fails_is_one_warning_and_training_goes_on(
    failing: str,
    sentence: str,
    tmp_path: Path,
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None if failing == "import" else fake_wandb(failing))
    tracker = Tracker(tmp_path, config, wandb_id="kept")
    tracker.step(row(1))
    tracker.step(row(2))
    tracker.evaluation({"loss": 2.0})
    tracker.close()
    assert list(losses(tmp_path / "metrics.jsonl")) == [1, 2]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert warnings[0].startswith(f"warning: {sentence}")
    assert "going on with metrics.jsonl only" in warnings[0]
    if failing in ("import", "init", "exit"):
        assert tracker.wandb_id == "kept"  # the next start may have more luck


def test_without_wandb_nothing_of_it_is_imported_and_its_id_is_kept(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    config.tracking.wandb = False
    tracker = Tracker(tmp_path, config, wandb_id="earlier")
    tracker.step(row(1))
    assert tracker.wandb_id == "earlier"
    assert "wandb" not in sys.modules
