"""Background text in which things are hidden: the words and sentences of any folder of text."""

from __future__ import annotations

import ast
import hashlib
import re
import warnings
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from titans_data.corpus import read_corpus
from titans_data.parts import list_files
from titans_data.tally import Tally
from titans_dist.config import ConfigError

MOST_CHARACTERS = 1 << 26
"""Characters of a folder that are read; a longer haystack begins with them again."""
_NO_TEXT = {"test", "tests", "idle_test"}
_SENTENCE_END = re.compile("[.!?][\"'\u201d\u2019)\\]]* (?=[\"'\u201c\u2018(\\[]?[A-Z0-9])")
"""The space after a sentence. There is no list of abbreviations, so that `Mr. X` counts as an end."""


class Text:
    """A text with single spaces for white space, repeated for ever."""

    def __init__(self, content: str) -> None:
        """Raises ConfigError where it has no words."""
        self._content = " ".join(content.split())
        if not self._content:
            raise ConfigError("the background text has no words; give a file or folder with text as evaluation.text")
        self._period = len(self._content) + 1

    @cached_property
    def digest(self) -> str:
        """sha256 of the text."""
        return hashlib.sha256(self._content.encode("utf-8", "surrogatepass")).hexdigest()

    def first(self, words: int) -> str:
        """The first `words` words, the text repeated where it has not as many."""
        rounds, rest = divmod(words, len(self._ends))
        whole = [self._content] * rounds
        return " ".join([*whole, self._content[: self._ends[rest - 1]]] if rest else whole)

    def sentences_in(self, characters: int) -> int:
        """How many sentences the first characters have, the last perhaps cut off."""
        rounds, rest = divmod(characters, self._period)
        return rounds * len(self._starts) + bisect_left(self._starts, rest)

    def start(self, sentence: int) -> int:
        """Characters before a sentence."""
        rounds, rest = divmod(sentence, len(self._starts))
        return rounds * self._period + self._starts[rest]

    @property
    def sentences(self) -> int:
        """How many sentences the text has."""
        return len(self._starts)

    def sentence(self, number: int) -> str:
        """A sentence, counted from 0; after the last comes the first."""
        number %= len(self._starts)
        start = self._starts[number]
        end = self._starts[number + 1] - 1 if number + 1 < len(self._starts) else len(self._content)
        return self._content[start:end]

    @cached_property
    def _ends(self) -> array[int]:
        """Where each word ends."""
        ends = array("I", (match.start() for match in re.finditer(" ", self._content)))
        ends.append(len(self._content))
        return ends

    @cached_property
    def _starts(self) -> array[int]:
        """Where each sentence starts."""
        starts = array("I", [0])
        starts.extend(match.end() for match in _SENTENCE_END.finditer(self._content))
        return starts


def load_text(source: str | Path | None) -> Text:
    """The text of a file or folder, in the order of its paths; None: the documentation of the standard library.

    Raises DataError where it cannot be read, ConfigError where it is empty.
    """
    found: list[str] = []
    size = 0
    for document in _documentation() if source is None else _documents(str(source)):
        found.append(document)
        size += len(document)
        if size >= MOST_CHARACTERS:
            break
    return Text("\n".join(found)[:MOST_CHARACTERS])


def _documents(source: str) -> Iterator[str]:
    for document in read_corpus("text", source, "text", Tally()):
        yield document.text


def _documentation() -> Iterator[str]:
    """The documentation strings of the running Python's library, but for examples of its prompt."""
    for file in list_files("stdlib", ""):
        if _NO_TEXT & set(file.name.split("/")):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes that the library itself should not use
                tree = ast.parse(Path(file.path).read_bytes())
        except (SyntaxError, ValueError):
            continue  # some of its files are wrong on purpose
        for text in _docstrings(tree):
            yield "\n\n".join(paragraph for paragraph in text.split("\n\n") if ">>>" not in paragraph)


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    text = ast.get_docstring(node)
    if text:
        yield text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child)
