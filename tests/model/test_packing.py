"""Documents packed into one row do not see each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.model.models import MODELS, SEGMENT, VOCABULARY, model, tokens

LENGTH = 26
DOCUMENTS = [(0, 5), (5, 6), (6, 16), (16, 26)]
"""Inside a chunk, one token long, across a segment's border, on one."""


def packed(documents: list[tuple[int, int]]) -> Tensor:
    starts = torch.zeros(1, LENGTH, dtype=torch.bool)
    starts[0, [first for first, _ in documents]] = True
    return starts


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_no_document_sees_another(name: str) -> None:
    """Bit for bit: all the other tokens of the row change, a document's logits do not."""
    x, starts = tokens(1, LENGTH), packed(DOCUMENTS)
    logits = model(name)(x, starts=starts)
    for first, last in DOCUMENTS:
        other = (x + 1 + tokens(1, LENGTH, seed=7) % (VOCABULARY - 1)) % VOCABULARY
        other[:, first:last] = x[:, first:last]
        assert (other != x).sum() == LENGTH - (last - first)
        assert torch.equal(model(name)(other, starts=starts)[:, first:last], logits[:, first:last])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_document_on_a_border_is_the_document_alone(name: str) -> None:
    """Where the grids of chunks, segments and shards begin with it, it does not matter that others are in the row."""
    documents = [(0, SEGMENT), (SEGMENT, 24), (24, 26)]
    size = MODELS[name].memory.chunk_size
    documents = documents if SEGMENT % size == 0 else [(0, 3 * size), (3 * size, 24), (24, 26)]
    x = tokens(1, LENGTH)
    logits = model(name)(x, starts=packed(documents))
    for first, last in documents:
        torch.testing.assert_close(logits[:, first:last], model(name)(x[:, first:last]), rtol=1e-10, atol=1e-10)


def is_linear(name: str) -> bool:
    return MODELS[name].memory.choice("retention") in ("none", "l2")


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("mac") and is_linear(name)])
@torch.no_grad()
def test_the_first_chunk_s_tokens_are_alone_anywhere(name: str) -> None:
    """A document that begins inside a chunk has a shorter first chunk: up to its end it is the document alone."""
    size = MODELS[name].memory.chunk_size
    first = 5 * size - 1 if size > 1 else 19
    x = tokens(1, LENGTH)
    logits = model(name)(x, starts=packed([(first, first + 1)]))
    alone = model(name)(x[:, first : first + 1])
    torch.testing.assert_close(logits[:, first : first + 1], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_row_that_begins_with_a_document_is_a_plain_row(name: str) -> None:
    x = tokens(2, LENGTH)
    starts = torch.zeros(2, LENGTH, dtype=torch.bool)
    starts[0, 0] = True  # the other row does not say so, and means it
    torch.testing.assert_close(model(name)(x, starts=starts), model(name)(x), rtol=1e-10, atol=1e-10)
