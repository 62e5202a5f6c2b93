"""A piece that is read in legs, by several workers, gives what one reading of the whole gives."""

from __future__ import annotations

import hashlib
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.distributed import run_distributed
from tests.parallel.layouts import MODELS, config
from titans_data.tokenize import BytesTokenizer
from titans_dist.config import ConfigError
from titans_dist.evaluation.measure import Material, Measuring, Progress, bin_of
from titans_dist.evaluation.samples import Samples
from titans_dist.evaluation.tasks import Sample, Text
from titans_dist.evaluation.work import Piece, Result
from titans_dist.model import build_model, generate

HELD_OUT = torch.randint(0, 64, (1000,), generator=torch.Generator().manual_seed(3))


class Letters:
    """Questions of letters that the small model knows as tokens; right is what begins with the first letter."""

    name = "letters"

    def sample(self, length: int, index: int, seed: int, tokenizer: Any, text: Any) -> Sample:
        tokens = length - 4 if index < 9 else length
        prompt = "".join(chr(33 + (7 * i + index) % 30) for i in range(tokens))
        return Sample(self.name, length, seed, index, prompt, (prompt[0],), (0.0,), 4, tokens)

    def score(self, sample: Sample, output: str) -> float:
        return float(output.startswith(sample.answers[0]))


def material(folder: Path) -> Material:
    return Material(
        samples=Samples(folder, {"letters": Letters()}, BytesTokenizer(), Text("none")),
        held_out=lambda start, count: HELD_OUT[start : start + count],
        held_out_tokens=len(HELD_OUT),
        bytes_per_token=3.5,
    )


def measured(rank: int, world: int, name: str, piece: Piece, legs: list[int], folder: Path) -> list[tuple[Result, int]]:
    """The result for each length of a leg, and how many legs it took; every leg by another worker."""
    from titans_dist.parallel import cpu
    from titans_dist.parallel.processes import make_groups
    from titans_dist.parallel.reader import Reader

    made = config(MODELS[name], tensor=world, sequence=False)
    cpu.install()
    make_groups(made.parallel)
    found = []
    for leg in legs:
        workers = [Measuring(Reader(made, torch.device("cpu"), piece=16), material(folder), leg) for _ in range(2)]
        progress: Progress | Result = Progress()
        count = 0
        while isinstance(progress, Progress):
            progress = workers[count % 2].advance(piece, pickle.loads(pickle.dumps(progress)))
            count += 1
        found.append((progress, count))
    return found


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("name", ["mac", "mag"])
@torch.no_grad()
def test_losses_by_position_are_those_of_the_plain_model(name: str, tensor: int, tmp_path: Path) -> None:
    piece = Piece("positions", 150, 0, 1, 2)
    model = build_model(MODELS[name], 1234)
    for rows in run_distributed(measured, tensor, name, piece, [10**6, 40], tmp_path):
        (whole, once), (parts, often) = rows
        assert once == 1 and often == 8
        stretches = [HELD_OUT[start : start + 151] for start in (150, 300)]
        assert whole.samples == hashlib.sha256(b"".join(part.numpy().tobytes() for part in stretches)).hexdigest()
        for result in (whole, parts):
            assert result.detail["bytes_per_token"] == [3.5, 3.5]
            assert result.tokens == 300
            for number, (score, sums) in enumerate(zip(result.scores, result.detail["losses"], strict=True)):
                stretch = HELD_OUT[150 * (number + 1) :][:151]
                losses = F.cross_entropy(model(stretch[None, :-1])[0], stretch[1:], reduction="none")
                assert score == pytest.approx(losses.mean().item(), rel=1e-5)
                wanted: dict[str, float] = {}
                for position, loss in enumerate(losses.tolist()):
                    first = 0 if position == 0 else 2 ** int(math.log2(position))
                    wanted[str(first)] = wanted.get(str(first), 0.0) + loss
                assert sums == pytest.approx(wanted, rel=1e-5)


def handed_over(rank: int, world: int, folder: Path) -> tuple[int, int]:
    """Bytes of the state's numbers after one leg, and of the storages behind them."""
    from titans_dist.parallel import cpu
    from titans_dist.parallel.processes import make_groups
    from titans_dist.parallel.reader import Reader

    made = config(MODELS["mag"], sequence=False, tensor=1)
    cpu.install()
    make_groups(made.parallel)
    worker = Measuring(Reader(made, torch.device("cpu"), piece=64), material(folder), leg=64)
    progress = worker.advance(Piece("letters", 200, 0, 0, 1), Progress())
    assert isinstance(progress, Progress)
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in progress.state.values()}
    return sum(x.numel() * x.element_size() for x in progress.state.values()), sum(storages.values())


def test_nothing_but_the_state_is_handed_over(tmp_path: Path) -> None:
    """A window's keys are the end of all that were read at once, which stays behind."""
    ((numbers, storages),) = run_distributed(handed_over, 1, tmp_path)
    assert 0 < storages == numbers


@torch.no_grad()
def test_an_answer_does_not_depend_on_the_legs_and_is_the_plain_model_s(tmp_path: Path) -> None:
    piece = Piece("letters", 100, 0, 0, 3)
    ((whole, _), (parts, often)), *_ = run_distributed(measured, 1, "mag", piece, [10**6, 30], tmp_path)
    assert often > 3
    assert (whole.scores, whole.detail, whole.samples) == (parts.scores, parts.detail, parts.samples)
    model = build_model(MODELS["mag"], 1234)
    for index, output in enumerate(whole.detail["output"]):
        prompt = torch.tensor([list(Letters().sample(100, index, 0, None, None).prompt.encode())])
        answer = generate(model, prompt, 4, temperature=0)[0, prompt.shape[1] :]
        assert output == BytesTokenizer().decode(answer.tolist())
    assert whole.detail["prompt_tokens"] == [96] * 3


def refused(rank: int, world: int, piece: Piece, folder: Path) -> str:
    from titans_dist.parallel import cpu
    from titans_dist.parallel.processes import make_groups
    from titans_dist.parallel.reader import Reader

    made = config(MODELS["mag"], sequence=False)
    cpu.install()
    make_groups(made.parallel)
    with pytest.raises(ConfigError) as error:
        Measuring(Reader(made, torch.device("cpu")), material(folder)).advance(piece, Progress())
    return str(error.value)


def test_nothing_is_ever_cut_off(tmp_path: Path) -> None:
    (sentence,) = run_distributed(refused, 1, Piece("letters", 50, 0, 9, 1), tmp_path)
    assert "has 50 tokens and an answer of 4, which is more than its 50" in sentence
    (sentence,) = run_distributed(refused, 1, Piece("positions", 1000, 0, 0, 1), tmp_path)
    assert "the held-out text has 1,000 tokens, too few for positions at 1,000" in sentence


def test_bins_are_powers_of_two() -> None:
    assert [bin_of(position) for position in (0, 1, 2, 3, 4, 1023, 1024)] == ["0", "1", "2", "2", "4", "512", "1024"]
