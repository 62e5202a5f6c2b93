"""Facts among the sentences of a text: the published prompt, the order of the facts, and the published score."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.evaluation.tasks.helpers import Words, golden, write_babi
from titans_data.tokenize import BytesTokenizer
from titans_dist.config import ConfigError
from titans_dist.evaluation.tasks import Sample, TaskDoesNotFit, Text, tasks
from titans_dist.evaluation.tasks.babi import babi_stories
from titans_dist.evaluation.tasks.stories import SHAPES, Story

TEXT = Text(
    "This is the first of two sentences that have ten words. Too short. "
    "This one is the second and it has eleven words. Nine words are one too few for this text."
)
PLACES = ["bathroom", "bedroom", "garden", "hallway", "kitchen", "office"]


@pytest.fixture(scope="module")
def babi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_babi(tmp_path_factory.mktemp("en-10k"))


def test_stories_are_read_with_the_facts_before_each_question(babi: Path) -> None:
    assert babi_stories(str(babi), "qa1", "test") == (
        Story(("Mary moved to the bathroom.", "John went to the hallway."), "Where is Mary?", "bathroom", (0,)),
        Story(
            (
                "Mary moved to the bathroom.",
                "John went to the hallway.",
                "Daniel went back to the hallway.",
                "Sandra moved to the garden.",
            ),
            "Where is Daniel?",
            "hallway",
            (2,),
        ),
        Story(("John journeyed to the kitchen.",), "Where is John?", "kitchen", (0,)),
    )
    (third,) = babi_stories(str(babi), "qa3", "test")
    assert third.support == (0, 1, 2)


@pytest.mark.parametrize("protocol", ["", "_finetuned"])
def test_prompts_are_the_published_text(babi: Path, protocol: str) -> None:
    form = golden(f"babilong_qa1{protocol}")
    length = len(form.split()) + (20 if not protocol else 2)
    task = tasks(babi)[f"babilong_qa1{protocol}"]
    found = [task.sample(length, index, 42, Words(), TEXT) for index in range(300)]
    (equal, *_) = [sample for sample in found if sample.prompt == form]
    before = form.index("Mary moved")
    assert equal.answers == ("bathroom",)
    assert equal.depths == (round(len(form[:before].split()) / len(form.split()), 6),)


@pytest.mark.parametrize("kind", ["babilong", "babi_like"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("protocol", ["", "_finetuned"])
def test_facts_keep_their_order_and_whole_sentences_lie_between(
    babi: Path, kind: str, shape: str, protocol: str
) -> None:
    text = Text(" ".join(f"There was a number {i} that stood for no more than itself." for i in range(50)))
    for index in range(3):
        found = tasks(babi)[f"{kind}_{shape}{protocol}"].sample(2000, index, 42, Words(), text)
        context = found.prompt.partition("<context>\n")[2].partition("\n</context>")[0] or found.prompt.split("\n")[0]
        sentences = [f"{part}." for part in context.removesuffix(".").split(". ")]
        facts = [sentence for sentence in sentences if not sentence.startswith("There was a number")]
        numbers = [int(sentence.split()[4]) for sentence in sentences if sentence not in facts]
        assert numbers == [(numbers[0] + i) % 50 for i in range(len(numbers))], "the text goes on from a random place"
        question = found.prompt.rpartition("Question: ")[2].strip().rpartition("\n")[2]
        if kind == "babilong":
            stories = babi_stories(str(babi), shape, "test" if protocol else "train")
            assert any((list(one.facts), one.question) == (facts, question) for one in stories)
        tokens = found.prompt.split()
        starts = {len(found.prompt[: found.prompt.index(context)].split())}
        place = starts.pop()
        begins = set()
        for sentence in sentences:
            if sentence in facts:
                begins.add(round(place / len(tokens), 6))
            place += len(sentence.split())
        assert set(found.depths) <= begins and len(set(found.depths)) == len(found.depths)


def test_places_of_facts_are_spread_over_the_whole_text() -> None:
    """Among them the one before the first sentence and the one after the last."""
    text = Text(" ".join(f"There was a number {i} that stood for no more than itself." for i in range(50)))
    depths = []
    for index in range(300):
        found = tasks()["babi_like_qa4_finetuned"].sample(150, index, 42, Words(), text)
        depths += found.depths
    assert min(depths) == 0 and max(depths) > 0.9
    for low in (0, 0.25, 0.5, 0.75):
        assert sum(low <= depth < low + 0.25 for depth in depths) > 0.15 * len(depths)


def test_a_story_that_fits_is_looked_for(babi: Path) -> None:
    """The story of qa1 with four facts needs ten words more than a length may have."""
    task = tasks(babi)["babilong_qa1_finetuned"]
    questions = {task.sample(17, i, 1, Words(), TEXT).prompt.split("\n")[1] for i in range(40)}
    assert questions == {"Where is Mary?", "Where is John?"}
    with pytest.raises(TaskDoesNotFit) as caught:
        task.sample(5, 0, 1, Words(), TEXT)
    assert caught.value.least == 5 + 3 + 2
    assert task.sample(10, 0, 1, Words(), TEXT).prompt == "John journeyed to the kitchen.\nWhere is John?"


def test_tokenizers_of_short_tokens_get_room_for_the_answer(babi: Path) -> None:
    assert tasks(babi)["babilong_qa1"].sample(4000, 0, 1, Words(), TEXT).new_tokens == 20
    found = tasks(babi)["babilong_qa1"].sample(4000, 0, 1, BytesTokenizer(), TEXT)
    assert found.new_tokens > len("\nAnswer: The most recent location of Daniel is bathroom.")


def test_without_data_the_user_is_told_what_to_get(tmp_path: Path, babi: Path) -> None:
    def ask(folder: Path | None) -> None:
        tasks(folder)["babilong_qa2"].sample(4000, 0, 1, Words(), TEXT)

    with pytest.raises(
        ConfigError, match=r"download and unpack \S+zip of https://\S+ and set evaluation\.babi to its folder"
    ):
        ask(None)
    with pytest.raises(ConfigError, match=r"has 0 files qa2_\*_train\.txt and must have one"):
        ask(tmp_path)
    (tmp_path / "qa2_x_train.txt").write_text("1 Mary went home.\n2 Where is Mary?\thome\t7\n")
    with pytest.raises(ConfigError, match="is no file of bAbI"):
        ask(tmp_path)
    (tmp_path / "qa2_x_train.txt").write_text("1 Mary went home.\n")
    with pytest.raises(ConfigError, match="has no questions"):
        ask(tmp_path)
    with pytest.raises(ConfigError, match="no sentence of 10 tokens"):
        tasks(babi)["babilong_qa1"].sample(4000, 0, 1, Words(), Text("Much too short. All of it."))


def score(shape: str, question: str, answer: str, output: str) -> float:
    prompt = f"<example>\nQuestion: Where is the office?\n</example>\n\nQuestion: {question}"
    return tasks()[f"babilong_{shape}"].score(Sample("", 0, 0, 0, prompt, (answer,), (), 20, 0), output)


@pytest.mark.parametrize(
    ("shape", "question", "answer", "output", "right"),
    [
        ("qa1", "Where is Mary?", "garden", "Answer: The most recent location of Mary is garden.", 1),
        ("qa1", "Where is Mary?", "garden", "GARDEN", 1),
        ("qa1", "Where is Mary?", "garden", "the kitchen", 0),
        ("qa1", "Where is Mary?", "garden", "garden or kitchen", 0),
        ("qa1", "Where is Mary?", "garden", "garden. Not the kitchen.", 1),
        ("qa1", "Where is Mary?", "garden", "Well. garden", 0),
        ("qa1", "Where is Mary?", "garden", "garden<context>kitchen", 1),
        ("qa1", "Where is Mary?", "garden", "garden\n<example>kitchen", 1),
        ("qa1", "Where is Mary?", "garden", "garden\nQuestion: is it the kitchen?", 1),
        ("qa1", "Where is Mary?", "garden", "", 0),
        ("qa3", "Where was the milk before the garden?", "office", "Before the garden it was in the office", 1),
        ("qa3", "Where was the milk before the garden?", "office", "the garden", 0),
        ("qa4", "What is the kitchen south of?", "bedroom", "bedroom", 1),
        ("qa5", "Who gave the milk to Fred?", "Bill", "Bill gave the milk to Fred", 1),
        ("qa5", "Who gave the milk to Fred?", "Bill", "bill and Mary", 0),
        ("qa5", "What did Fred give to Bill?", "apple", "Fred gave the apple.", 1),
    ],
)
def test_few_shot_scores(shape: str, question: str, answer: str, output: str, right: float) -> None:
    assert score(shape, question, answer, output) == right


@given(
    named=st.sets(st.sampled_from(PLACES)),
    asked=st.sets(st.sampled_from(PLACES), max_size=1),
    answer=st.sampled_from(PLACES),
    data=st.data(),
)
def test_labels_found_but_for_those_of_the_question_must_be_the_answer(
    named: set[str], asked: set[str], answer: str, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(sorted(named)))
    output = " ".join(data.draw(st.sampled_from([word, word.upper(), f"the {word},"])) for word in order)
    question = f"Where was the milk before the {' '.join(asked)}?"
    assert score("qa3", question, answer, output) == (named - asked == {answer})


@pytest.mark.parametrize(
    ("output", "right"),
    [("garden", 1), (" garden\n", 1), ("garden\nWhere", 1), ("the garden", 0), ("Garden", 0), ("garden.", 0), ("", 0)],
)
def test_fine_tuned_is_exact_match(output: str, right: float) -> None:
    asked = Sample("", 0, 0, 0, "", ("garden",), (), 3, 0)
    assert tasks()["babi_like_qa1_finetuned"].score(asked, output) == right


def test_generated_stories_never_carry_the_name_of_the_benchmark() -> None:
    assert sum(name.startswith("babilong_") for name in tasks()) == 10
    assert sum(name.startswith("babi_like_") for name in tasks()) == 10
