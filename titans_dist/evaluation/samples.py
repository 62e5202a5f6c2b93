"""Samples that were made once: every checkpoint, worker and leg after that reads them from the run's folder.

A file's name says what its samples were made from: the piece of work, the tokenizer, the background text, the stories
and the code of the tasks. Beside it are the tokens of their prompts, because encoding a long text takes a hundred times
its size in memory; of the text itself only the end is kept. Nothing of either counts unless both are whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from titans_data.tokenize import Tokenizer
from titans_dist.evaluation import tasks as code
from titans_dist.evaluation.tasks import Sample, Task, Text, digest
from titans_dist.evaluation.work import Piece

_TOKEN = np.dtype("<u4")
_BLOCK = 1 << 20
_KEPT = 1 << 12
"""Characters of the end of a prompt: every task puts its question there, and scores by nothing else of it."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """The samples of any piece."""

    folder: Path
    """`reports/samples` of the run."""
    tasks: dict[str, Task]
    tokenizer: Tokenizer
    text: Text
    stories: str | None = None
    """Folder of bAbI."""

    def of(self, piece: Piece) -> Stored:
        """Made now, or made before. Raises TaskDoesNotFit where the length leaves no room."""
        path = self._path(piece)
        if not _is_whole(path):
            samples = [
                self.tasks[piece.task].sample(piece.length, index, piece.seed, self.tokenizer, self.text)
                for index in range(piece.first, piece.first + piece.count)
            ]
            _write(path, samples, self.tokenizer)
        return Stored(path)

    def are_made(self, piece: Piece) -> bool:
        """Whether those of a piece need only be read."""
        return _is_whole(self._path(piece))

    def _path(self, piece: Piece) -> Path:
        name = hashlib.sha256(f"{piece.key} {self._origin}".encode()).hexdigest()[:16]
        return self.folder / f"{piece.task}-{piece.length}-{name}.jsonl"

    @cached_property
    def _origin(self) -> str:
        """What all samples are made from."""
        found = hashlib.sha256(f"{self.tokenizer.fingerprint} {self.text.digest} {self.stories}".encode())
        for file in sorted(Path(code.__file__).parent.rglob("*")):
            if file.is_file() and file.suffix != ".pyc":
                found.update(file.read_bytes())
        return found.hexdigest()


class Stored(Sequence[Sample]):
    """The samples of one piece on the disk: only what is asked for is in memory, and of a long prompt only its end."""

    def __init__(self, path: Path) -> None:
        self._lines, self._tokens = path, _beside(path)
        with path.open("rb") as file:
            head = json.loads(file.readline())
            self._starts: list[int] = []
            start = file.tell()
            while file.readline():
                self._starts.append(start)
                start = file.tell()
        self.digest: str = head["samples"]
        """That of the samples, see `tasks.digest`."""
        self.lengths: list[int] = head["tokens"]
        """Tokens of each prompt."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: Any) -> Any:
        with self._lines.open("rb") as file:
            file.seek(self._starts[number])
            values: dict[str, Any] = json.loads(file.readline())
        lists: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return Sample(**lists)

    def tokens(self, number: int, start: int, count: int) -> np.ndarray:
        """At most `count` tokens (t,) uint32 of a prompt, from `start` on."""
        count = min(count, self.lengths[number] - start)
        return np.fromfile(self._tokens, _TOKEN, count, offset=_TOKEN.itemsize * (sum(self.lengths[:number]) + start))


def _beside(path: Path) -> Path:
    return path.with_suffix(".tokens")


def _is_whole(path: Path) -> bool:
    """Whether samples and tokens are what was written."""
    try:
        with path.open("rb") as file:
            head = json.loads(file.readline())
            found = hashlib.sha256()
            _add(found, file)
        with _beside(path).open("rb") as file:
            _add(found, file)
        return found.hexdigest() == head["content"]
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _add(found: Any, file: Any) -> None:
    while block := file.read(_BLOCK):
        found.update(block)


def _write(path: Path, samples: list[Sample], tokenizer: Tokenizer) -> None:
    """The samples last. Two workers may write the same files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [dataclasses.replace(sample, prompt=sample.prompt[-_KEPT:]) for sample in samples]
    lines: list[Any] = [json.dumps(dataclasses.asdict(sample)).encode() + b"\n" for sample in kept]
    tokens: list[Any] = [tokenizer.encode_batch([sample.prompt])[0].astype(_TOKEN) for sample in samples]
    content = hashlib.sha256()
    for part in (*lines, *tokens):
        content.update(part)
    head = {"samples": digest(samples), "tokens": [len(each) for each in tokens], "content": content.hexdigest()}
    _replace(_beside(path), tokens)
    _replace(path, [json.dumps(head).encode() + b"\n", *lines])


def _replace(path: Path, parts: Iterable[Any]) -> None:
    """Whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        for part in parts:
            file.write(part)
    Path(file.name).replace(path)
