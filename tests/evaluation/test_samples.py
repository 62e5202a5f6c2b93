"""Samples are made once, and read as they were made."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from titans_data.tokenize import BytesTokenizer
from titans_dist.evaluation.samples import Samples
from titans_dist.evaluation.tasks import Sample, TaskDoesNotFit, Text, digest, tasks
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
    wanted = [tasks()[name].sample(3000, index, 42, BytesTokenizer(), TEXT) for index in (2, 3, 4)]
    assert [*made[0]] == [*made[1]] == [*made[2]] == wanted
    assert {stored.digest for stored in made} == {digest(wanted)}
    assert task.made == 3
    assert len(list(tmp_path.iterdir())) == 2  # samples and tokens


def test_tokens_are_those_of_the_prompt_part_by_part(tmp_path: Path) -> None:
    stored = Samples(tmp_path, tasks(), BytesTokenizer(), TEXT).of(Piece("niah_single_2", 3000, 42, 0, 2))
    for number, sample in enumerate(stored):
        wanted = BytesTokenizer().encode_batch([sample.prompt])[0].tolist()
        parts = [stored.tokens(number, start, 700) for start in range(0, 3000, 700)]
        assert np.concatenate(parts).tolist() == wanted and len(wanted) == stored.lengths[number] == sample.tokens


def test_of_a_long_prompt_the_end_is_kept_and_scores_the_same(tmp_path: Path) -> None:
    piece, task = Piece("babi_like_qa1", 20_000, 42, 0, 4), tasks()["babi_like_qa1"]
    stored = Samples(tmp_path, tasks(), BytesTokenizer(), TEXT).of(piece)
    for index, short in enumerate(stored):
        whole = task.sample(20_000, index, 42, BytesTokenizer(), TEXT)
        assert len(short.prompt) < len(whole.prompt) and whole.prompt.endswith(short.prompt)
        assert dataclasses.replace(short, prompt=whole.prompt) == whole
        for output in (f"The answer is {whole.answers[0]}.", "kitchen", "bathroom garden", ""):
            assert task.score(short, output) == task.score(whole, output)


def test_anything_that_they_are_made_from_makes_others(tmp_path: Path) -> None:
    task = Counted("passkey")
    samples = Samples(tmp_path, {"passkey": task}, BytesTokenizer(), TEXT)
    piece = Piece("passkey", 1000, 42, 0, 1)
    samples.of(piece)
    samples.of(dataclasses.replace(piece, seed=43))
    samples.of(dataclasses.replace(piece, length=1001))
    dataclasses.replace(samples, text=Text("Another text.")).of(piece)
    dataclasses.replace(samples, stories="/elsewhere").of(piece)
    assert task.made == len(list(tmp_path.glob("*.jsonl"))) == 5


@pytest.mark.parametrize("kind", ["jsonl", "tokens"])
@pytest.mark.parametrize("change", ["cut", "altered", "empty", "gone"])
def test_a_file_that_is_not_whole_is_made_anew(change: str, kind: str, tmp_path: Path) -> None:
    task = Counted("passkey")
    samples, piece = Samples(tmp_path, {"passkey": task}, BytesTokenizer(), TEXT), Piece("passkey", 1000, 42, 0, 2)
    assert not samples.are_made(piece)
    made = [*samples.of(piece)]
    assert samples.are_made(piece)
    (path,) = tmp_path.glob(f"*.{kind}")
    whole = path.read_bytes()
    if change == "gone":
        path.unlink()
    else:
        altered = whole[:-300] + bytes([whole[-300] ^ 1]) + whole[-299:]
        path.write_bytes({"cut": whole[:-300], "altered": altered, "empty": b""}[change])
    assert not samples.are_made(piece)
    assert [*samples.of(piece)] == made and task.made == 4
    assert path.read_bytes() == whole and len(list(tmp_path.iterdir())) == 2


def test_what_does_not_fit_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(TaskDoesNotFit):
        Samples(tmp_path, tasks(), BytesTokenizer(), TEXT).of(Piece("passkey", 10, 42, 0, 1))
    assert not list(tmp_path.iterdir())
