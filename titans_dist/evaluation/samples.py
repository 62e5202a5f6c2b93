"""Samples that were made once: every checkpoint, worker and leg after that reads them from the run's folder.

A file's name says what its samples were made from: the piece of work, the tokenizer, the background text, the stories
and the code of the tasks. Its first line is the digest of the rest, without which nothing of it counts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from functools import cached_property
from pathlib import Path

from titans_data.tokenize import Tokenizer
from titans_dist.evaluation import tasks as code
from titans_dist.evaluation.tasks import Sample, Task, Text, digest
from titans_dist.evaluation.work import Piece


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

    def of(self, piece: Piece) -> list[Sample]:
        """Made now, or read. Raises TaskDoesNotFit where the length leaves no room."""
        path = self.folder / f"{piece.task}-{piece.length}-{self._name(piece)}.jsonl"
        found = _read(path)
        if found is None:
            found = [
                self.tasks[piece.task].sample(piece.length, index, piece.seed, self.tokenizer, self.text)
                for index in range(piece.first, piece.first + piece.count)
            ]
            _write(path, found)
        return found

    def _name(self, piece: Piece) -> str:
        return hashlib.sha256(f"{piece.key} {self._origin}".encode()).hexdigest()[:16]

    @cached_property
    def _origin(self) -> str:
        """What all samples are made from."""
        found = hashlib.sha256(f"{self.tokenizer.fingerprint} {self.text.digest} {self.stories}".encode())
        for file in sorted(Path(code.__file__).parent.rglob("*")):
            if file.is_file() and file.suffix != ".pyc":
                found.update(file.read_bytes())
        return found.hexdigest()


def _read(path: Path) -> list[Sample] | None:
    """The samples of a file; None where there is none that is whole."""
    try:
        first, *lines = path.read_text(encoding="utf-8").splitlines()
        samples = [_sample(json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError):
        return None
    return samples if digest(samples) == first else None


def _write(path: Path, samples: list[Sample]) -> None:
    """Whole or not at all: two workers may write the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".part", delete=False) as file:
        for line in (digest(samples), *(json.dumps(dataclasses.asdict(sample)) for sample in samples)):
            file.write(line + "\n")
    Path(file.name).replace(path)


def _sample(values: dict[str, object]) -> Sample:
    lists = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return Sample(**lists)  # type: ignore[arg-type]
