"""metrics.jsonl survives kills, restarts and full disks, and stays JSON whatever the numbers are."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import titans_dist
from titans_dist.config import Config, DataConfig
from titans_dist.tracking import StepRow, Tracker, losses, read_metrics
from titans_dist.tracking.metrics import MetricsFile


def row(step: int, loss: float = 1.0, **fields: float) -> StepRow:
    values = {"grad_norm": 0.5, "lr": 1e-3, "tokens": 100 * step, "tokens_per_s": 1e4, "step_time_s": 0.1}
    values |= {"data_wait": 0.25, "memory_bytes": 1 << 30, **fields}
    return StepRow(step=step, loss=loss, **values)  # type: ignore[arg-type]


def config(**changes: object) -> Config:
    made = Config(name="demo", run_dir="unused", data=DataConfig(format="synthetic", path=""))
    made.training.steps = 10
    for key, value in changes.items():
        setattr(made.training, key, value)
    return made


def test_a_step_is_one_line_with_every_field(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, config())
    tracker.step(row(1, loss=2.5))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()  # before close: nothing waits in a buffer
    found = json.loads(line)
    assert found.pop("time") > 1.7e9
    assert found == {
        "kind": "train",
        "step": 1,
        "loss": 2.5,
        "grad_norm": 0.5,
        "lr": 1e-3,
        "tokens": 100,
        "tokens_per_s": 1e4,
        "step_time_s": 0.1,
        "data_wait": 0.25,
        "memory_bytes": 1 << 30,
    }


def test_events_and_evaluations_carry_the_latest_step_unless_given(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, config())
    tracker.step(row(7))
    tracker.event("checkpoint", step=5, seconds=0.5)
    tracker.event("save_failed", reason="disk full")
    tracker.evaluation({"loss": 3.0, "bits_per_byte": 1.5})
    rows = read_metrics(tmp_path / "metrics.jsonl")[1:]
    for found in rows:
        del found["time"]
    assert rows == [
        {"kind": "event", "step": 5, "name": "checkpoint", "seconds": 0.5},
        {"kind": "event", "step": 7, "name": "save_failed", "reason": "disk full"},
        {"kind": "evaluation", "step": 7, "loss": 3.0, "bits_per_byte": 1.5},
    ]


def test_a_resume_is_an_event_and_its_losses_replace_the_earlier_ones(tmp_path: Path) -> None:
    first = Tracker(tmp_path, config())
    for step in range(1, 6):
        first.step(row(step, loss=10.0 - step))
    first.close()
    second = Tracker(tmp_path, config(), resumed_step=3)
    second.step(row(4, loss=0.4))
    second.close()
    assert losses(tmp_path / "metrics.jsonl") == {1: 9.0, 2: 8.0, 3: 7.0, 4: 0.4, 5: 5.0}
    kinds = [(found["kind"], found["step"]) for found in read_metrics(tmp_path / "metrics.jsonl")]
    assert kinds[-2:] == [("event", 3), ("train", 4)]


@given(cut=st.integers(min_value=1))
def test_a_line_torn_anywhere_by_a_kill_costs_that_line_only(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("torn") / "metrics.jsonl"
    file = MetricsFile(path)
    file.append("train", 1, {"loss": 1.0})
    file.append("train", 2, {"loss": 2.0})
    whole = path.read_bytes()
    second = whole.index(b"\n") + 1
    path.write_bytes(whole[: second + cut % (len(whole) - second - 1)])
    MetricsFile(path).append("train", 3, {"loss": 3.0})
    assert losses(path) == {1: 1.0, 3: 3.0}


def test_every_step_before_a_sigkill_is_there(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, pathlib\n"
        "from titans_dist.tracking.metrics import MetricsFile\n"
        "file = MetricsFile(pathlib.Path(sys.argv[1]))\n"
        "for step in range(1, 201): file.append('train', step, {'loss': 1 / step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = str(Path(titans_dist.__file__).parents[1])
    path = tmp_path / "metrics.jsonl"
    killed = subprocess.run([sys.executable, "-c", program, path], env=os.environ | {"PYTHONPATH": root})
    assert killed.returncode == -signal.SIGKILL
    assert list(losses(path)) == list(range(1, 201))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_json_lacks_are_strings_in_the_file_and_numbers_again_when_read(value: float, tmp_path: Path) -> None:
    Tracker(tmp_path, config()).step(row(1, loss=value))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse)["loss"] == str(value)
    assert str(losses(tmp_path / "metrics.jsonl")[1]) == str(value)


def test_a_full_disk_is_said_once_and_the_rows_after_it_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker(tmp_path, config(log_interval=100))
    tracker.step(row(1))
    real = tracker._metrics._file
    assert real is not None

    class Full:
        """A disk with room for ten more bytes."""

        def write(self, data: bytes) -> int:
            return real.write(data[:10])

    tracker._metrics._file = Full()  # type: ignore[assignment]
    tracker.step(row(2))
    tracker.step(row(3))
    tracker._metrics._file = real
    tracker.step(row(4))
    assert list(losses(tmp_path / "metrics.jsonl")) == [1, 4]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert "metrics.jsonl cannot be written" in warnings[0]


def test_a_run_folder_that_cannot_be_made_does_not_stop_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    tracker = Tracker(tmp_path / "file" / "run", config())
    tracker.step(row(1))
    tracker.step(row(2))
    tracker.close()
    assert capsys.readouterr().err.count("warning: ") == 1


def test_memory_rows_hold_their_layers_and_survive_numbers_that_json_lacks(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, config())
    gate = {"low": 0.1, "high": math.nan, "counts": [3, 1]}
    layer = {"surprise_before": 1.5, "surprise_after": math.inf, "s_norm": None, "alpha": gate}
    tracker.memories(10, {"blocks.0.mixer.memory": layer})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (row["kind"], row["step"]) == ("memory", 10)
    assert repr(row["layers"]) == repr({"blocks.0.mixer.memory": layer})
