"""Every command of the README and the guides is run, at a small size, in a folder with the files it speaks of."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
TINY = [
    "parallel.tensor=1",
    "training.steps=2",
    "training.global_batch_size=4",
    "training.micro_batch_size=2",
    "data.sequence_length=32",
    "model.num_layers=2",
    "model.hidden_size=16",
    "model.window=8",
    "model.memory.chunk_size=8",
    "evaluation.max_sequences=4",
]


def commands() -> list[str]:
    """Lines of the sh blocks of the README and the guides, without comments."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    blocks = [block for page in pages for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)]
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def runnable() -> list[str]:
    return [line for line in commands() if "titans" in line]


def programs() -> list[str]:
    """The README's Python blocks."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: the corpora that the README's commands name."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("user")
    paragraphs = "\n\n".join(p.read_text() for p in sorted((ROOT / "titans_dist").rglob("*.py"))).split("\n\n")
    texts = ["\n\n".join(paragraphs[i : i + 4]) for i in range(0, len(paragraphs), 4)]  # enough for a held-out split
    (folder / "my_texts").mkdir()
    for i, text in enumerate(texts):
        (folder / "my_texts" / f"{i}.txt").write_text(text)
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress((folder / "corpus.jsonl").read_bytes()))
    pq.write_table(pa.table({"text": texts}), folder / "corpus.parquet")
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(folder / "my_dataset")
    np.random.default_rng(0).integers(0, 4096, 20_000).astype(np.uint16).tofile(folder / "tokens.bin")
    return folder


def test_the_readme_has_the_two_commands_and_the_examples() -> None:
    assert [line for line in commands() if line.startswith("make")] == [
        "make train",
        "make test",
        "make evaluate",
        "make matrix",
        "make recall",
    ]
    assert len(runnable()) >= 10
    assert len(programs()) >= 2


@pytest.mark.parametrize("program", programs())
def test_a_program_of_the_readme_runs(program: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("line", runnable())
def test_a_command_of_the_readme_works(line: str, folder: Path) -> None:
    program, *arguments = shlex.split(line)
    # A key of the README's own command stays; `info` and `--cfg` need no small size.
    tiny = [] if "info" in arguments else [o for o in TINY if o.split("=")[0] not in line]
    done = subprocess.run(
        [str(Path(sys.executable).parent / Path(program).name), *arguments, *tiny],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    name = re.search(r"name=(\w+)", line)
    if name and " train " in line:
        assert (folder / "runs" / name[1] / "STATUS").read_text() == "done\n"


def test_the_folders_of_the_map_exist() -> None:
    table = (ROOT / "README.md").read_text().split("## Where things are")[1]
    for cell in re.findall(r"^\| (.*?) \|", table, re.MULTILINE)[2:]:
        first = ""
        for path in re.findall(r"`([^`]+)`", cell):
            base = first if path.count("/") == 1 and first and not (ROOT / path).exists() else ""
            assert (ROOT / base / path).is_dir(), path
            first = str(Path(path).parent) if not base else first


def test_the_experiments_it_names_exist() -> None:
    for name in re.findall(r"`(?:experiment=)?(titans_\w+m|titans_1b3)`", (ROOT / "README.md").read_text()):
        assert (ROOT / "configs" / "experiment" / f"{name}.yaml").is_file()
