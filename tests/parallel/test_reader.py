"""A document read piece by piece, on one process or split over two, gives what the plain model gives in one call."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.distributed import run_distributed
from tests.parallel.layouts import MODELS, config
from titans_dist.config import Config, ConfigError
from titans_dist.model import build_model, generate

TOKENS = 75
PIECE = 13  # no multiple of a chunk, a segment or a window, and no divisor of the document's length
MODELS_READ = ["lmm", "mac", "mag", "mal", "gated_deltanet", "transformer"]


def settings(name: str, tensor: int) -> Config:
    return config(MODELS[name], tensor=tensor, sequence=False)


def document() -> Tensor:
    return torch.randint(0, 64, (TOKENS,), generator=torch.Generator().manual_seed(0))


def read(rank: int, world: int, made: Config, piece: int) -> dict[str, Any]:
    from titans_dist.parallel import cpu
    from titans_dist.parallel.processes import make_groups
    from titans_dist.parallel.reader import Reader

    cpu.install()
    make_groups(made.parallel)
    reader = Reader(made, torch.device("cpu"), piece)
    logits, after = reader.read(document()[:50], reader.start())
    second, _ = reader.read(document()[50:], after)
    losses = torch.cat([part for part, _ in reader.losses(document(), reader.start())])
    answer = reader.answer(document(), 6)
    return {
        "logits": logits,
        "second": second,
        "losses": losses,
        "answer": answer,
        "ended": reader.answer(document(), 6, ends=[answer[3]]),
        "none": reader.answer(document(), 0),
        "likelihood": reader.likelihood(document()[50:], logits, after),
        "of the answer": reader.likelihood(torch.tensor(answer), *reader.read(document(), reader.start())),
    }


def trims(rank: int, world: int, made: Config, tokens: int) -> int:
    """How often memory is given back over so many tokens."""
    from titans_dist.parallel import cpu, reader
    from titans_dist.parallel.processes import make_groups

    cpu.install()
    make_groups(made.parallel)
    counted: list[None] = []
    with mock.patch.object(cpu, "trim", lambda: counted.append(None)), mock.patch.object(reader, "TRIMMED", 20):
        one = reader.Reader(made, torch.device("cpu"), PIECE)
        one.read(document()[:tokens], one.start())
    return len(counted)


def test_freed_memory_goes_back_to_the_system() -> None:
    assert run_distributed(trims, 1, settings("lmm", 1), 19) == [0]
    assert run_distributed(trims, 1, settings("lmm", 1), TOKENS) == [3]  # after pieces of 13: 26, 52 and 75


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("name", MODELS_READ)
@torch.no_grad()
def test_pieces_give_what_one_call_gives(name: str, tensor: int) -> None:
    made = settings(name, tensor)
    model = build_model(made.model, made.training.seed)
    tokens = document()[None]
    logits = model(tokens)
    answer = generate(model, tokens, 6, temperature=0)[0, TOKENS:].tolist()
    for found in run_distributed(read, tensor, made, PIECE):
        torch.testing.assert_close(found["logits"], logits[0, 49], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["second"], logits[0, -1], rtol=1e-4, atol=1e-5)
        wanted = F.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")
        torch.testing.assert_close(found["losses"], wanted, rtol=1e-4, atol=1e-5)
        assert found["answer"] == answer
        assert found["ended"] == answer[: answer.index(answer[3])]
        assert found["none"] == []
        likelihood, is_likeliest = found["likelihood"]
        assert likelihood == pytest.approx(-wanted[49:].double().sum().item(), rel=1e-5)
        assert not is_likeliest
        assert found["of the answer"][1]


def test_the_size_of_a_piece_changes_nothing() -> None:
    made = settings("mac", 1)
    (small,), (whole,) = run_distributed(read, 1, made, 1), run_distributed(read, 1, made, 1000)
    torch.testing.assert_close(small["losses"], whole["losses"], rtol=1e-4, atol=1e-5)
    assert small["answer"] == whole["answer"]


def refused(rank: int, world: int, made: Config) -> str:
    from titans_dist.parallel.reader import Reader

    with pytest.raises(ConfigError) as error:
        Reader(made, torch.device("cpu"))
    return str(error.value)


@pytest.mark.parametrize("layout", [{"pipeline": 2}, {"context": 2}, {"tensor": 2, "sequence": True}])
def test_other_layouts_are_refused(layout: dict[str, Any]) -> None:
    for message in run_distributed(refused, 1, config(MODELS["mag"], **layout)):
        assert "over parallel.tensor alone" in message
