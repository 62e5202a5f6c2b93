"""A result is written down once, and an evaluation that was killed goes on with what is missing."""

from __future__ import annotations

import dataclasses
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from titans_dist.config import EvaluationConfig, UserError
from titans_dist.evaluation.ledger import Ledger, Measured
from titans_dist.evaluation.work import Piece, Result, pieces

MEASURED = Measured("abc", 50, 1000, "mag titans")
PIECE = Piece("niah_single_1", 2048, 42, 0, 8)
RESULT = Result([1.0, 0.5], "digest", 4096, 1.5, 1 << 20, {"depths": [[0.1], [0.9]]})


def test_a_result_comes_back_as_it_was(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "reports" / "evaluation.sqlite")
    assert ledger.add(MEASURED, PIECE, RESULT)
    (row,) = Ledger(ledger.path).rows()
    assert (row.measured, row.piece, row.result) == (MEASURED, PIECE, RESULT)
    assert ledger.done("abc") == {PIECE.key} and ledger.done("other") == set()


def test_the_first_result_of_a_piece_stays(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    ledger.add(MEASURED, PIECE, RESULT)
    assert not ledger.add(MEASURED, PIECE, dataclasses.replace(RESULT, scores=[0.0, 0.0]))
    assert [row.result.scores for row in ledger.rows()] == [[1.0, 0.5]]
    assert ledger.add(dataclasses.replace(MEASURED, checkpoint="def", step=100), PIECE, RESULT)
    assert [row.measured.step for row in ledger.rows(steps=[100])] == [100]


@pytest.mark.parametrize("statement", ["UPDATE results SET scores = '[]'", "DELETE FROM results"])
def test_nothing_is_ever_changed(tmp_path: Path, statement: str) -> None:
    ledger = Ledger(tmp_path / "ledger")
    ledger.add(MEASURED, PIECE, RESULT)
    with sqlite3.connect(ledger.path) as connection, pytest.raises(sqlite3.IntegrityError, match="results are final"):
        connection.execute(statement)
    assert len(ledger.rows()) == 1


def test_writers_of_the_same_piece_at_once_leave_one_result(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.evaluation.test_ledger import *\n"
        "ledger = Ledger(Path(sys.argv[1]))\n"
        "print(sum(ledger.add(MEASURED, dataclasses.replace(PIECE, first=8 * i), RESULT) for i in range(20)))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "ledger")]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) for _ in range(3)]
    assert sum(int(writer.communicate()[0]) for writer in writers) == 20
    assert len(Ledger(tmp_path / "ledger").rows()) == 20


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ledger").write_bytes(b"no database at all, but long enough to be read as one" * 100)
    with pytest.raises(UserError, match="is no ledger of results"):
        Ledger(tmp_path / "ledger")


def test_pieces_cover_every_sample_once_and_begin_with_the_long_ones() -> None:
    settings = EvaluationConfig(tasks=["a", "b"], lengths=[1024, 4096], samples=19, shard=8)
    found = pieces(settings)
    covered = [(p.task, p.length, i) for p in found for i in range(p.first, p.first + p.count)]
    assert sorted(covered) == sorted((t, n, i) for t in "ab" for n in (1024, 4096) for i in range(19))
    assert [piece.length for piece in found] == sorted((piece.length for piece in found), reverse=True)


def test_the_key_of_a_piece_is_of_everything_in_it() -> None:
    changes = {"task": "x", "length": 1, "seed": 1, "first": 1, "count": 1}
    keys = {PIECE.key} | {dataclasses.replace(PIECE, **{name: value}).key for name, value in changes.items()}
    assert len(keys) == 6
