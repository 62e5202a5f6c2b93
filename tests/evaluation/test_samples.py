"""Samples are made once, and read as they were made."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from titans_data.tokenize import BytesTokenizer
from titans_dist.evaluation.samples import Samples
from titans_dist.evaluation.tasks import Sample, TaskDoesNotFit, Text, tasks
from titans_dist.evaluation.work import Piece

TEXT = Text("The sun is warm. The sea is wide. Nobody knows \u00e9 or \u2028 by heart.")


class Counted:
    """A task that counts how often it is asked for a sample."""

    def __init__(self, name: str) -> None:
        self.name, self._inner, self.made = name, tasks()[name], 0

    def sample(self, *arguments: Any) -> Sample:
        self.made += 1
        return self._inner.sample(*arguments)

    def score(self, sample: Sample, output: str) -> float:
        return self._inner.score(sample, output)


@pytest.mark.parametrize("name", ["niah_single_2", "passkey", "mqar", "babi_like_qa2"])
def test_what_is_read_is_what_was_made(name: str, tmp_path: Path) -> None:
    piece = Piece(name, 3000, 42, 2, 3)
    task = Counted(name)
    made = [Samples(tmp_path, {name: task}, BytesTokenizer(), TEXT).of(piece) for _ in range(3)]
    assert (
        made[0] == made[1] == made[2] == [tasks()[name].sample(3000, i, 42, BytesTokenizer(), TEXT) for i in (2, 3, 4)]
    )
    assert task.made == 3
    assert len(list(tmp_path.iterdir())) == 1


def test_anything_that_they_are_made_from_makes_others(tmp_path: Path) -> None:
    task = Counted("passkey")
    samples = Samples(tmp_path, {"passkey": task}, BytesTokenizer(), TEXT)
    piece = Piece("passkey", 1000, 42, 0, 1)
    samples.of(piece)
    samples.of(dataclasses.replace(piece, seed=43))
    samples.of(dataclasses.replace(piece, length=1001))
    dataclasses.replace(samples, text=Text("Another text.")).of(piece)
    dataclasses.replace(samples, stories="/elsewhere").of(piece)
    assert task.made == len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("change", ["cut", "altered", "empty"])
def test_a_file_that_is_not_whole_is_made_anew(change: str, tmp_path: Path) -> None:
    task = Counted("passkey")
    samples, piece = Samples(tmp_path, {"passkey": task}, BytesTokenizer(), TEXT), Piece("passkey", 1000, 42, 0, 2)
    made = samples.of(piece)
    (path,) = tmp_path.iterdir()
    whole = path.read_text()
    path.write_text({"cut": whole[:-700], "altered": whole.replace("grass", "gras"), "empty": ""}[change])
    assert samples.of(piece) == made and task.made == 4
    assert path.read_text() == whole and len(list(tmp_path.iterdir())) == 1


def test_what_does_not_fit_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(TaskDoesNotFit):
        Samples(tmp_path, tasks(), BytesTokenizer(), TEXT).of(Piece("passkey", 10, 42, 0, 1))
    assert not list(tmp_path.iterdir())
