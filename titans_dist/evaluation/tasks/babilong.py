"""Facts hidden in order among the sentences of a long text: BABILong, and the same with generated stories.

The few-shot protocol explains the task and shows examples; the fine-tuned one, for a model that was trained on the
task, is nothing but context, question and, after a space, the answer. As published,
few-shot questions are of bAbI's training files, which nothing is trained on there; fine-tuned ones are of its test
files. The published contexts are of the size less 300 tokens of GPT-2, for a prompt of about so many; here a length is
that of all that the model reads and writes by its own tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from titans_data.tokenize import Tokenizer
from titans_dist.config import ConfigError
from titans_dist.evaluation.tasks.babi import babi_stories
from titans_dist.evaluation.tasks.fit import Draft, Fitted, count, fit
from titans_dist.evaluation.tasks.sample import Sample, TaskDoesNotFit, generator
from titans_dist.evaluation.tasks.stories import SHAPES, Story, story
from titans_dist.evaluation.tasks.strings import strings
from titans_dist.evaluation.tasks.text import Text

LEAST_TOKENS = 10
"""Sentences with fewer tokens are no background."""
_TRIES = 50
"""Stories that are looked at to find one that the length has room for."""
_ENDS = (".", "<context>", "<example>", "question")
_FINE_TUNED = "{context}\n{question}"


@dataclass(frozen=True)
class HiddenFacts:
    """One of the five tasks by one of the two protocols."""

    name: str
    shape: str
    """qa1 to qa5."""
    fine_tuned: bool
    draw: Callable[[Random], Story]

    def sample(self, length: int, index: int, seed: int, tokenizer: Tokenizer, text: Text) -> Sample:
        """See Task. Of the stories, one of those that fit into the length."""
        rng = generator(self.name, length, index, seed)
        background = _Background(text, rng.randrange(text.sentences), tokenizer)
        new_tokens = self._new_tokens(tokenizer)
        least = []
        for _ in range(_TRIES):
            chosen = self.draw(rng)
            try:
                found = self._fit(chosen, rng, background, length, new_tokens, tokenizer)
            except TaskDoesNotFit as error:
                least.append(error.least)
                continue
            return Sample(
                self.name,
                *(length, seed, index, found.prompt, (chosen.answer,), found.depths, new_tokens, found.tokens),
            )
        raise TaskDoesNotFit(self.name, length, min(least))

    def score(self, sample: Sample, output: str) -> float:
        """Few-shot: whether the labels found, but for those of the question, are the answer and no other.

        Only the output before the first full stop, example, context or question counts. (The published program
        looks for `Question` in the output in small letters and so never cuts there.) Fine-tuned: whether the first
        line is the answer.
        """
        (answer,) = sample.answers
        if self.fine_tuned:
            return float(output.strip().partition("\n")[0].strip() == answer)
        question = sample.prompt.rpartition("\nQuestion: ")[2].lower()
        written = output.lower()
        for end in _ENDS:
            written = written.partition(end)[0]
        labels = [label.lower() for label in strings("babilong")[self.shape]["labels"]]
        found = {label for label in labels if label in written and label not in question}
        return float(found == {answer.lower()})

    def _new_tokens(self, tokenizer: Tokenizer) -> int:
        """As published, or more where words have so many tokens that the longest answer needs them."""
        form = strings("babilong")
        if not self.fine_tuned:
            return max(form["new_tokens"], count(tokenizer, form[self.shape]["longest"]) + 1)
        return 1 + max(count(tokenizer, label) for label in form[self.shape]["labels"])

    def _around(self, question: str) -> tuple[str, str]:
        """What stands before and after the context."""
        form = strings("babilong")
        if self.fine_tuned:
            head, tail = _FINE_TUNED.split("{context}")
        else:
            head, tail = form["template"].split("{context}")
        parts = {key: form[self.shape][key] for key in ("instruction", "examples", "post_prompt")}
        return head.format(**parts), tail.format(question=question)

    def _fit(
        self, chosen: Story, rng: Random, background: _Background, length: int, new_tokens: int, tokenizer: Tokenizer
    ) -> Fitted:
        head, tail = self._around(chosen.question)
        where = sorted(rng.random() for _ in chosen.facts)

        def build(n: int) -> Draft:
            """Each fact stands before one of n sentences, or after the last."""
            facts = list(zip([int(share * (n + 1)) for share in where], chosen.facts, strict=True))
            parts: list[str] = []
            starts: list[int] = []
            size = len(head)
            next_fact = 0
            for place, sentence in enumerate([*background.first(n), ""]):
                while next_fact < len(facts) and facts[next_fact][0] == place:
                    parts.append(facts[next_fact][1])
                    starts.append(size)
                    size += len(parts[-1]) + 1
                    next_fact += 1
                if sentence:
                    parts.append(sentence)
                    size += len(sentence) + 1
            return Draft(head + " ".join(parts) + tail, tuple(starts[i] for i in chosen.support))

        return fit(self.name, build, 0, length, new_tokens, tokenizer)


class _Background:
    """The sentences of a text that are long enough, from one on."""

    def __init__(self, text: Text, start: int, tokenizer: Tokenizer) -> None:
        self._text, self._next, self._tokenizer = text, start, tokenizer
        self._kept: list[str] = []
        self._seen = 0

    def first(self, n: int) -> list[str]:
        """The first n; raises ConfigError where the text has none at all."""
        while len(self._kept) < n:
            numbers = range(self._next, self._next + max(64, n - len(self._kept)))
            sentences = [self._text.sentence(number) for number in numbers]
            encoded = self._tokenizer.encode_batch(sentences)
            self._kept += [s for s, ids in zip(sentences, encoded, strict=True) if len(ids) >= LEAST_TOKENS]
            self._next += len(sentences)
            self._seen += len(sentences)
            if not self._kept and self._seen >= self._text.sentences:
                raise ConfigError(
                    f"the background text has no sentence of {LEAST_TOKENS} tokens; give other text as evaluation.text"
                )
        return self._kept[:n]


def _story_of(folder: str | None, shape: str, split: str, rng: Random) -> Story:
    return rng.choice(babi_stories(folder, shape, split))


def hidden_facts(babi: str | Path | None) -> list[HiddenFacts]:
    """BABILong from the folder of bAbI, and babi_like from generated stories, by both protocols."""
    folder = None if babi is None else str(babi)
    tasks: list[HiddenFacts] = []
    for shape in SHAPES:
        for fine_tuned, ending, split in ((False, "", "train"), (True, "_finetuned", "test")):
            real, generated = partial(_story_of, folder, shape, split), partial(story, shape)
            tasks.append(HiddenFacts(f"babilong_{shape}{ending}", shape, fine_tuned, real))
            tasks.append(HiddenFacts(f"babi_like_{shape}{ending}", shape, fine_tuned, generated))
    return tasks
