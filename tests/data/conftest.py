"""A small corpus with its expected token streams, worked out by the plainest loop that can be written."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import titans_data
from tests.data.remotes import S3, FaultyProxy, faulty_proxy, moto_server, use_endpoint
from titans_data import DatasetCard, PrepareOptions, prepare
from titans_data.card import FileCard

PAGE_TOKENS = 50
# The smallest shards that pages of 50 tokens allow, so that even a small corpus has many.
SHARD_BYTES = 8 * PAGE_TOKENS + 4096
VALIDATION_FRACTION = 0.3
BYTES_END = 256


@dataclass(frozen=True)
class Stream:
    """A split as a plain list of tokens with, for each, whether it starts a document."""

    tokens: list[int]
    is_start: list[bool]
    bytes: int
    documents: int

    def span(self, start: int, length: int) -> tuple[list[int], list[int]]:
        """The tokens and span-local document ids that a source has to return."""
        ids = []
        current = 0
        for position in range(start, start + length):
            if position > start and self.is_start[position]:
                current += 1
            ids.append(current)
        return self.tokens[start : start + length], ids


def expected_stream(documents: list[str], split: str) -> Stream:
    tokens: list[int] = []
    is_start: list[bool] = []
    size = count = 0
    for text in documents:
        data = text.encode("utf-8")
        held_out = int(hashlib.sha256(data).hexdigest()[:16], 16) < VALIDATION_FRACTION * 2**64
        if held_out != (split == "validation"):
            continue
        for number, byte in enumerate(data):
            tokens.append(byte)
            is_start.append(number == 0)
        tokens.append(BYTES_END)
        is_start.append(False)
        size += len(data)
        count += 1
    return Stream(tokens, is_start, size, count)


@dataclass(frozen=True)
class Prepared:
    folder: Path
    corpus: Path
    options: PrepareOptions
    card: DatasetCard
    documents: list[str]
    train: Stream
    validation: Stream


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """60 texts of 1 to 1500 characters, some of them not ASCII, some longer than several pages."""
    source = random.Random(7)
    words = ["memory", "surprise", "gate", "naïve", "测试", "λ", "x = 1\n", "\n\n", "  ", "decay"]
    return [" ".join(source.choices(words, k=source.choice([1, 3, 20, 250]))) + f" {i}" for i in range(60)]


@pytest.fixture(scope="session")
def corpus(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number, text in enumerate(documents):
        (folder / f"{number:03}.txt").write_bytes(text.encode())
    return folder


@pytest.fixture(scope="session")
def prepared(corpus: Path, documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The corpus as a dataset of bytes. Tests that damage it work on a copy."""
    options = PrepareOptions(
        format="text",
        source=str(corpus),
        tokenizer="bytes",
        validation_fraction=VALIDATION_FRACTION,
        page_tokens=PAGE_TOKENS,
        shard_bytes=SHARD_BYTES,
    )
    folder = tmp_path_factory.mktemp("prepared") / "dataset"
    card = prepare(options, folder)
    train, validation = (expected_stream(documents, split) for split in ("train", "validation"))
    return Prepared(folder, corpus, options, card, documents, train, validation)


@pytest.fixture(scope="session")
def s3_server(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """An S3 server in a process of its own that holds the dataset of bytes."""
    with moto_server(tmp_path_factory.mktemp("moto") / "log") as server:
        server.upload(prepared.folder, "corpus")
        yield server


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The server, with an environment in which s3:// URLs lead to it."""
    use_endpoint(monkeypatch, s3_server.endpoint)
    return s3_server


@pytest.fixture
def proxy(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy in front of the server, with an environment in which s3:// URLs lead to the proxy."""
    with faulty_proxy(s3_server.port) as faulty:
        use_endpoint(monkeypatch, faulty.url)
        yield faulty


@pytest.fixture
def files(prepared: Prepared) -> list[FileCard]:
    """The cards of the files of the train split."""
    split = prepared.card.splits["train"]
    return [split.index, *split.shards]


@pytest.fixture
def smallest(files: list[FileCard]) -> int:
    """The least cache_bytes for the train split."""
    return 2 * max(file.size_bytes for file in files)


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment of a child process that can import titans_data."""
    return os.environ | {"PYTHONPATH": str(Path(titans_data.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a Python script in a process group of its own; what is still alive at the end of the test is killed."""
    children: list[subprocess.Popen[str]] = []

    def run(*arguments: object, **variables: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=environment | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        children.append(child)
        return child

    yield run
    for child in children:
        if child.poll() is None:
            os.killpg(child.pid, 9)
        child.communicate()


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], Path]:
    """Write a Python script."""

    def write(code: str) -> Path:
        path = tmp_path / f"{hashlib.sha256(code.encode()).hexdigest()[:8]}.py"
        path.write_text(code)
        return path

    return write


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def file_tree() -> Callable[[Path], dict[str, bytes]]:
    """Relative path and content of every file below a folder."""
    return tree
