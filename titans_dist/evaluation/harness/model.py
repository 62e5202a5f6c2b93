"""What lm-evaluation-harness asks of a model, answered by a `Reader`.

Nothing is ever cut: the model reads texts of any length with a state of constant size, so a text is always scored
whole, without windows. A text that begins a document is read after an end-of-document token, because in training that
is what stands before the first token of a document.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor

from titans_data.tokenize import Tokenizer
from titans_dist.config import ConfigError, UserError
from titans_dist.parallel.reader import Reader

NEW_TOKENS = 256
"""Most tokens of an answer, where the task does not say; the harness's own."""


class ReaderLM(LM):
    """Our model as a model of the harness; with tensor parallelism every method is collective."""

    def __init__(self, reader: Reader, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.reader, self._words = reader, tokenizer
        self.tokens = 0
        """Read and written so far."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Of each continuation after its context, in nats, and whether it is the likeliest. A context is read once."""
        pairs = [self.split(*request.args) for request in requests]
        found: dict[int, tuple[float, bool]] = {}
        for context, numbers in groupby(sorted(range(len(pairs)), key=lambda i: pairs[i][0]), lambda i: pairs[i][0]):
            logits, state = self.reader.read(self._read(context), self.reader.start())
            for number in numbers:
                continuation = self._read(pairs[number][1])
                likelihood, is_likeliest = self.reader.likelihood(continuation, logits, state)
                found[number] = finite(likelihood), is_likeliest
        return [found[number] for number in range(len(pairs))]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Of each whole text as a document, in nats."""
        found = []
        for request in requests:
            tokens = self._read([self._words.end_of_document, *self.encode(request.args[0])])
            parts = [losses.double().sum().item() for losses, _ in self.reader.losses(tokens, self.reader.start())]
            found.append(finite(-math.fsum(parts)))
        return found

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The likeliest text after each prompt, up to what ends it. Raises ConfigError for answers drawn at random."""
        return [self._write(*request.args) for request in requests]

    def split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of both, which the tokenizer sees as one text, as the harness does it.

        White space at the end of the context counts to the continuation. Should a token span the border, what is
        scored begins with it. Raises ConfigError where nothing is left to be scored.
        """
        whole, before = self.encode(context + continuation), self.encode(context.rstrip())
        shared = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        if not whole[shared:]:
            raise ConfigError(f"there is nothing to score after {context[-60:]!r}; mend the task or leave it out")
        return whole[:shared] or [self._words.end_of_document], whole[shared:]

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        return self._words.encode_batch([text])[0].tolist()

    def _read(self, tokens: Sequence[int]) -> Tensor:
        self.tokens += len(tokens)
        return torch.tensor(tokens)

    def _write(self, prompt: str, options: dict[str, Any]) -> str:
        settings = normalize_gen_kwargs(options, NEW_TOKENS)
        if settings["do_sample"]:
            raise ConfigError(
                f"the task draws its answers at random ({options}), and only the likeliest are written here; set "
                "do_sample: false in its generation_kwargs"
            )
        ends = [end for end in settings["until"] if end]
        tokens = self._read(self.encode(prompt) or [self._words.end_of_document])
        logits, state = self.reader.read(tokens, self.reader.start())
        written: list[int] = []
        text = ""
        while len(written) < settings["max_gen_toks"]:
            token = int(logits[: self._words.vocab_size].argmax())  # a model may have more ids than there are tokens
            if token == self._words.end_of_document:
                break
            written.append(token)
            text = self._words.decode(written)
            if any(end in text for end in ends):
                break
            logits, state = self.reader.read(self._read([token]), state)
        return text[: min((text.find(end) for end in ends if end in text), default=len(text))]


class Known(LM):
    """A model whose answers are known already."""

    def __init__(self, requests: Iterable[Instance], answers: Iterable[Any]) -> None:
        super().__init__()
        self._answers = {_key(request): answer for request, answer in zip(requests, answers, strict=True)}

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """As they are known."""
        return [self._answers[_key(request)] for request in requests]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """As they are known."""
        return [self._answers[_key(request)] for request in requests]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """As they are known."""
        return [self._answers[_key(request)] for request in requests]


def _key(request: Instance) -> str:
    return repr((request.request_type, request.args))


def finite(likelihood: float) -> float:
    """Raises UserError for nan and infinity, which would count as an answer."""
    if not math.isfinite(likelihood):
        raise UserError(
            f"the model's log-likelihood of a text is {likelihood}; its weights are no good, measure another"
        )
    return likelihood
