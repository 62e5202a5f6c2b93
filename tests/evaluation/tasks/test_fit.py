"""A prompt is as long as the length allows, and never longer; the text behind it."""

from __future__ import annotations

import bisect
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.evaluation.tasks.helpers import ESSAY, Words, write_babi
from titans_data import DataError
from titans_data.tokenize import BytesTokenizer, HuggingFaceTokenizer, train_bpe
from titans_dist.config import ConfigError
from titans_dist.evaluation.tasks import TaskDoesNotFit, Text, digest, load_text, tasks
from titans_dist.evaluation.tasks.fit import Draft, fit, largest
from titans_dist.evaluation.tasks.strings import words

PROSE = Text(
    " ".join(f"In the year {1000 + 7 * i} somebody counted {i * i} birds, and nobody believed it." for i in range(200))
)
TASKS = list(tasks())


@pytest.fixture(scope="module")
def bpe() -> HuggingFaceTokenizer:
    texts = [PROSE.first(2000), " ".join(words("adjectives")), " ".join(words("nouns"))]
    return train_bpe(texts, 1500)


@pytest.fixture(scope="module")
def babi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_babi(tmp_path_factory.mktemp("en-10k"))


@pytest.mark.parametrize("name", TASKS)
def test_no_prompt_is_too_long_and_one_piece_more_would_be(
    name: str, bpe: HuggingFaceTokenizer, babi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by the tokenizer anew, over the prompts that the task could have built."""
    builders = []

    def watched(task: str, build, least: int, length: int, new_tokens: int, tokenizer):  # type: ignore[no-untyped-def]
        builders.append(build)
        return fit(task, build, least, length, new_tokens, tokenizer)

    for module in ("needles", "passkey", "recall", "babilong"):
        monkeypatch.setattr(f"titans_dist.evaluation.tasks.{module}.fit", watched)
    for length in (1500, 3001):
        found = tasks(babi)[name].sample(length, 3, 42, bpe, PROSE)
        tokens = len(bpe.encode_batch([found.prompt])[0])
        assert found.tokens == tokens and tokens + found.new_tokens <= length == found.length
        build = builders[-1]
        pieces = next(n for n in range(5000) if build(n).prompt == found.prompt)
        assert len(bpe.encode_batch([build(pieces + 1).prompt])[0]) + found.new_tokens > length
        assert all(0 <= depth < 1 for depth in found.depths) and list(found.depths) == sorted(found.depths)
        assert found.depths


@given(
    costs=st.lists(st.integers(1, 40), min_size=1, max_size=300),
    start=st.integers(0, 50),
    room=st.integers(50, 3000),
    low=st.integers(0, 1),
)
def test_the_search_finds_what_a_walk_finds(costs: list[int], start: int, room: int, low: int) -> None:
    """On sizes that only grow there is one right answer."""
    sizes = [start]
    for i in range(room + 2):
        sizes.append(sizes[-1] + costs[i % len(costs)])
    room = max(room, sizes[low])
    asked = 0

    def measure(n: int) -> int:
        nonlocal asked
        asked += 1
        return sizes[n] if n < len(sizes) else sizes[-1] + 40 * (n - len(sizes))

    assert largest(measure, low, sizes[low], room) == bisect.bisect_right(sizes, room) - 1
    assert asked < 60


def test_the_search_needs_few_looks_at_long_prompts() -> None:
    noise = random.Random(0)
    steps = [noise.randint(5, 20) for _ in range(200_000)]
    sizes = [100]
    for step in steps:
        sizes.append(sizes[-1] + step)
    looks: list[int] = []

    def measure(n: int) -> int:
        looks.append(n)
        return sizes[n]

    n = largest(measure, 1, sizes[1], 1_900_000)
    assert sizes[n] <= 1_900_000 < sizes[n + 1] and len(looks) < 15


def test_the_search_holds_its_promise_where_sizes_go_up_and_down() -> None:
    def measure(n: int) -> int:
        return 10 * n + (7 * n) % 23

    for room in range(30, 4000, 37):
        n = largest(measure, 0, measure(0), room)
        assert measure(n) <= room < measure(n + 1)


def test_depths_are_shares_of_tokens() -> None:
    def build(n: int) -> Draft:
        return Draft("one two " + "x " * n + "three four", (4, 8, 8 + 2 * n))

    found = fit("task", build, 0, 10, 0, Words())
    assert (found.tokens, found.depths) == (10, (0.1, 0.2, 0.8))


def test_what_does_not_fit_says_so_across_processes() -> None:
    with pytest.raises(TaskDoesNotFit) as caught:
        fit("task", lambda n: Draft("one two three", ()), 0, 5, 4, Words())
    assert (caught.value.least, caught.value.exit_code) == (7, 2)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.least) == (str(caught.value), 7)


def test_text_has_single_spaces_and_goes_on_for_ever() -> None:
    assert ESSAY.first(9) == "A cat sat down. It was warm. Did it"
    assert ESSAY.first(16) == "A cat sat down. It was warm. Did it sleep? No! It only looked as if."
    assert ESSAY.first(34) == f"{ESSAY.first(16)} {ESSAY.first(16)} A cat"
    assert Text(" A  cat\tsat down.\nIt was warm. Did it sleep? No! It only looked as if.").digest == ESSAY.digest


@pytest.mark.parametrize(
    ("content", "sentences"),
    [
        ("One. Two? Three! Four", ["One.", "Two?", "Three!", "Four"]),
        ('He said "no." Then (perhaps.) He went.', ['He said "no."', "Then (perhaps.)", "He went."]),
        ("Version 3.11 of e.g. this is one. 5 is another.", ["Version 3.11 of e.g. this is one.", "5 is another."]),
        ("no end", ["no end"]),
    ],
)
def test_sentences(content: str, sentences: list[str]) -> None:
    text = Text(content)
    assert text.sentences == len(sentences)
    assert [text.sentence(i) for i in range(2 * len(sentences))] == sentences * 2
    twice = text.first(2 * len(content.split()))
    assert text.sentences_in(len(twice)) == 2 * len(sentences)
    for i, sentence in enumerate(sentences * 2):
        assert twice[text.start(i) :].startswith(sentence)
        assert text.sentences_in(text.start(i)) == i and text.sentences_in(text.start(i) + 1) == i + 1


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_text("Second\nfile.")
    (tmp_path / "a.md").write_text("First file.")
    assert load_text(tmp_path).first(4) == "First file. Second file."
    assert load_text(tmp_path / "a.md").first(2) == "First file."


def test_missing_and_empty_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_text(tmp_path / "none")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ConfigError, match="has no words; give a file or folder"):
        load_text(tmp_path)


def test_without_a_folder_the_text_is_the_documentation_of_python() -> None:
    text = load_text(None)
    assert text.sentences > 5000
    everything = text.first(10**5)
    assert "Return a shallow copy" in everything and ">>>" not in everything and "import " in everything


def test_samples_are_the_same_in_every_process(tmp_path: Path) -> None:
    """Whatever the seed of hashes; and not the same where one of task, length, index and seed differs."""
    program = f"""
from pathlib import Path
from tests.evaluation.tasks.test_fit import *
print(digest(every(Path({str(write_babi(tmp_path))!r}))))
"""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=root,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    samples = every(tmp_path)
    assert done.stdout.strip() == digest(samples)
    assert len({sample.prompt for sample in samples}) == len(samples)
    assert len({digest([sample]) for sample in samples}) == len(samples)
    random.seed(0)
    random.random()
    assert digest(every(tmp_path)) == digest(samples) != digest(reversed(samples))


def every(babi: Path) -> list:
    where = [(2500, 0, 42), (2600, 0, 42), (2500, 1, 42), (2500, 0, 43)]
    return [task.sample(*at, BytesTokenizer(), PROSE) for task in tasks(babi).values() for at in where]


def test_tasks_can_be_sent_to_workers(babi: Path) -> None:
    for task in tasks(babi).values():
        again = pickle.loads(pickle.dumps(task))
        assert again.sample(2500, 0, 1, BytesTokenizer(), PROSE) == task.sample(2500, 0, 1, BytesTokenizer(), PROSE)


def test_our_words_are_words_and_none_is_there_twice() -> None:
    for kind in ("adjectives", "nouns"):
        assert all(word.isascii() and word.isalpha() and word.islower() for word in words(kind))
        assert len(set(words(kind))) == len(words(kind)) > 250
