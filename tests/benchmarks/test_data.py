"""The benchmark of the data pipeline runs, and its numbers are about what it says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_loader_and_memory_tables_in_miniature() -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "data.py", "--quick", "loader", "memory"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "titans_data" in line]
    assert [re.search(r"rows of ([\d,]+)", row)[1] for row in rows] == ["256", "2,048", "8,192"]  # type: ignore[index]
    assert done.stdout.count("StreamingDataset") == 3
    assert "1,966,080 tokens" in done.stdout


def test_the_corpus_is_distinct_documents_of_the_size_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import data

    size = 400_000
    texts = [json.loads(line)["text"] for line in data.write_corpus(tmp_path / "c.jsonl", size).open()]
    assert size <= (tmp_path / "c.jsonl").stat().st_size < 2 * size
    assert len(set(texts)) == len(texts) > 10
