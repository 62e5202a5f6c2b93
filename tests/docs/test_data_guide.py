"""Every command of data_pipeline/README.md is run, in its order, with the corpora and the bucket it speaks of."""

from __future__ import annotations

import csv
import gzip
import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.remotes import moto_server, use_endpoint
from tests.docs.test_readme import ROOT, TINY
from titans_data import PrepareOptions, load_card
from titans_launch import cli, keys

GUIDE = (ROOT / "data_pipeline" / "README.md").read_text()


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder with the corpora that the guide names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted((ROOT / "titans_dist" / "config").glob("*.py"))
    texts = [part for path in files for part in re.split(r"\n\n\n", path.read_text())]
    (tmp_path / "my_texts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "my_texts" / f"{number}.txt").write_text(text)
    lines = [json.dumps({"content": text}) for text in [*texts, texts[-1], "short", "again\n" * 500]]
    (tmp_path / "web.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (tmp_path / "code").mkdir()
    pq.write_table(pa.table({"text": [text[::-1] for text in texts]}), tmp_path / "code" / "0.parquet")
    return tmp_path


@pytest.mark.slow
def test_the_commands_of_the_guide_work_one_after_the_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(commands()) >= 12
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # main lets SIGTERM end its process
    with moto_server(folder / "moto.log") as server:
        use_endpoint(monkeypatch, server.endpoint)
        for line in commands():
            program, *arguments = shlex.split(line)
            if program == "aws":
                source, address = arguments[-2:]
                assert server.upload(folder / source, address.rpartition("/")[2]) == address
                continue
            if Path(program).name == "python":
                assert arguments == ["benchmarks/data.py"]  # some minutes; tests/benchmarks/test_data.py has it small
                continue
            assert Path(program).name == "titans-dist"
            run(arguments)
    card = load_card(folder / "data" / "web")
    assert card.counts.filtered["min_characters"] >= 1
    assert card.counts.filtered["max_compression_ratio"] == card.counts.duplicates == 1
    with (folder / "samples.csv").open() as file:
        samples = list(csv.DictReader(file))
    assert {row["source"] for row in samples} == {"web", "code"}
    assert {int(row["step"]) for row in samples} == {*range(1, 21)}


def run(arguments: list[str]) -> None:
    """Run one command at a small size, which must be the same for all commands of a run."""
    line = " ".join(arguments)
    words = [*arguments, *(override for override in TINY if override.split("=")[0] not in line)]
    if arguments[0] != "train":
        assert cli.main(words) == 0, line
        return
    done = subprocess.run([sys.executable, "-m", "titans_launch", *words], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, line + done.stdout[-2000:] + done.stderr[-2000:]


def test_the_filters_and_keys_it_names_exist() -> None:
    named = re.findall(r"`((?:data|training|inspect)\.\w+)", GUIDE)
    assert set(named) <= {*keys.schema()}
    filters = re.findall(r"`data\.((?:min|max)_\w+)`", GUIDE)
    options = PrepareOptions(format="stdlib")
    assert set(filters) == {name for name in vars(options) if name.startswith(("min_", "max_"))}
