"""Multi-query associative recall: pairs of words, much that is neither, and then keys whose words are asked for.

After Arora et al. 2023, "Zoology: Measuring and Improving Recall in Efficient Language Models", arXiv 2312.04927,
where pairs come first, keys and values are of two disjoint halves of the vocabulary, and what lies between pairs and
queries is drawn from the rest. The original is made of token ids for models that are trained on nothing else. A
language model has seen few of its ids in such an order, so here they are English words, one to a line, a noun and an
adjective with a colon between: a form that it knows from lists. Of the keys that are asked for, all but the last
already have their answers, which shows the form; each sample scores the last, so that samples are independent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from titans_data.tokenize import Tokenizer
from titans_dist.evaluation.tasks.fit import Draft, count, fit
from titans_dist.evaluation.tasks.sample import Sample, generator
from titans_dist.evaluation.tasks.strings import words
from titans_dist.evaluation.tasks.text import Text


@dataclass(frozen=True)
class Recall:
    """Which word stood beside the key?"""

    name: str = "mqar"
    pairs: int = 16
    queries: int = 4

    def sample(self, length: int, index: int, seed: int, tokenizer: Tokenizer, text: Text) -> Sample:
        """See Task; needs no text."""
        rng = generator(self.name, length, index, seed)
        nouns = [noun for noun in words("nouns") if noun not in words("adjectives")]
        keys = rng.sample(nouns, self.pairs)
        values = rng.sample(words("adjectives"), self.pairs)
        value_of = dict(zip(keys, values, strict=True))
        asked = rng.sample(keys, self.queries)
        rest = sorted({*nouns, *words("adjectives")} - {*keys, *values})
        noise: list[str] = []
        pairs = [f"{key}: {value}\n" for key, value in value_of.items()]
        queries = [f"{key}: {value_of[key]}\n" for key in asked[:-1]]
        mark = sum(len(pair) for pair in pairs[: keys.index(asked[-1])])

        def build(n: int) -> Draft:
            noise.extend(rng.choice(rest) + "\n" for _ in range(n - len(noise)))
            return Draft("".join([*pairs, *noise[:n], *queries]) + asked[-1] + ":", (mark,))

        # One more than the longest value could need, to see that the word ends.
        new_tokens = 1 + max(count(tokenizer, f" {value}") for value in values)
        found = fit(self.name, build, 0, length, new_tokens, tokenizer)
        answer = value_of[asked[-1]]
        return Sample(
            *(self.name, length, seed, index, found.prompt, (answer,), found.depths, new_tokens, found.tokens)
        )

    def score(self, sample: Sample, output: str) -> float:
        """Whether the first word of the output is the value."""
        word = re.search("[a-z]+", output.lower())
        return float(word is not None and word[0] == sample.answers[0])
