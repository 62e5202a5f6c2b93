"""What a person reads while a run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from titans_dist.config import Config, DataConfig
from titans_dist.tracking import StepRow, Tracker
from titans_dist.tracking.console import duration, human, step_line


def row(step: int, **fields: float) -> StepRow:
    values = {"loss": 8.3172, "grad_norm": 1.234, "lr": 9.8e-4, "tokens": 1_234_567, "tokens_per_s": 12_345.6}
    values |= {"step_time_s": 0.5, "data_wait": 0.031, "memory_bytes": 1.5 * 2**30, **fields}
    return StepRow(step=step, **values)  # type: ignore[arg-type]


def test_one_line_says_it_all() -> None:
    assert step_line(row(7), 160, 76.5) == (
        "step   7/160 | loss  8.3172 |  12.3k tok/s |   1.2M tokens | grad   1.23 | lr 9.8e-04 | data   3% |"
        "  1.50 GiB | eta 1m16s"
    )


def test_columns_stay_where_they_are() -> None:
    small = step_line(row(1, loss=0.5, tokens=4096, tokens_per_s=950, grad_norm=0.01, data_wait=0), 30000, 4000)
    large = step_line(row(29999, loss=11.25, tokens=15e9, tokens_per_s=1.2e6, grad_norm=150, data_wait=1), 30000, 4000)
    assert [i for i, c in enumerate(small) if c == "|"] == [i for i, c in enumerate(large) if c == "|"]
    assert len(large) <= 130


def test_a_line_per_interval_and_always_the_first_and_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    config = Config(name="demo", run_dir="unused", data=DataConfig(format="synthetic", path=""))
    config.training.steps, config.training.log_interval = 25, 10
    tracker = Tracker(Path("/dev/null/nowhere"), config, resumed_step=3)
    for step in range(4, 26):
        tracker.step(row(step))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "resume | step 3"
    assert [line.split("|")[0].split()[-1] for line in lines[1:]] == ["4/25", "10/25", "20/25", "25/25"]
    assert lines[-1].endswith("eta 0s")


def test_events_read_as_words(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = Config(name="demo", run_dir="unused", data=DataConfig(format="synthetic", path=""))
    Tracker(tmp_path, config).event("save_failed", step=20, loss=0.123456)
    assert capsys.readouterr().out == "save failed | step 20 | loss 0.1235\n"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (950, "950"), (999.96, "1.0k"), (12_345, "12.3k"), (1.2e6, "1.2M"), (4.56e9, "4.6B"), (1.1e12, "1.1T")],
)
def test_counts(count: float, text: str) -> None:
    assert human(count) == text


def test_a_checkpoint_is_told_in_units(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Tracker(tmp_path, Config()).event("checkpoint", step=20, seconds=0.3149, bytes=54_841_952)
    assert capsys.readouterr().out == "checkpoint | step 20 | 0.31 s | 54.8MB\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (185, "3m05s"), (7800, "2h10m"), (356400, "4d03h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_numbers_that_are_none_still_print() -> None:
    line = step_line(row(1, loss=float("nan"), grad_norm=float("inf")), 10, 0)
    assert "loss     nan" in line
    assert "grad    inf" in line
