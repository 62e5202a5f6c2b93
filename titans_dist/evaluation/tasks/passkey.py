"""The pass key: one number, said twice in a long text of the same five sentences.

From Mohtashami and Jaggi 2023, "Landmark Attention: Random-Access Infinite Context Length for Transformers", arXiv
2305.16300. The noise is of whole groups of sentences, with the number at a random place between two of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from titans_data.tokenize import Tokenizer
from titans_dist.evaluation.tasks.fit import Draft, fit
from titans_dist.evaluation.tasks.sample import Sample, generator
from titans_dist.evaluation.tasks.strings import strings
from titans_dist.evaluation.tasks.text import Text


@dataclass(frozen=True)
class Passkey:
    """Find the number."""

    name: str = "passkey"

    def sample(self, length: int, index: int, seed: int, tokenizer: Tokenizer, text: Text) -> Sample:
        """See Task; needs no text."""
        rng = generator(self.name, length, index, seed)
        form = strings("passkey")
        key = str(rng.randint(1, 50_000))
        needle = form["needle"].format(value=key)
        where = rng.random()
        head, tail = form["prompt"].split("{context}")

        def build(n: int) -> Draft:
            before = int(where * (n + 1))
            groups = [" ".join([form["noise"]] * many) for many in (before, n - before)]
            lines = [part for part in (groups[0], needle, groups[1]) if part]
            mark = len(head) + (len(groups[0]) + 1 if groups[0] else 0)
            return Draft(head + "\n".join(lines) + tail, (mark,))

        found = fit(self.name, build, 0, length, form["new_tokens"], tokenizer)
        return Sample(
            *(self.name, length, seed, index, found.prompt, (key,), found.depths, form["new_tokens"], found.tokens)
        )

    def score(self, sample: Sample, output: str) -> float:
        """Whether the first number of the output is the pass key."""
        number = re.search("[0-9]+", output)
        return float(number is not None and int(number[0]) == int(sample.answers[0]))
