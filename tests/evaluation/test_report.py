"""The report tells what is in the ledgers, whose each number is, and what cannot be compared."""

from __future__ import annotations

import base64
import csv
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from titans_dist.config import Config, EvaluationConfig, UserError
from titans_dist.evaluation import report
from titans_dist.evaluation.ledger import FILE, Ledger, Measured
from titans_dist.evaluation.summary import T
from titans_dist.evaluation.tasks import about, tasks
from titans_dist.evaluation.tasks.strings import strings, words
from titans_dist.evaluation.work import Piece, Result
from titans_launch.cli import main

EARLY, LATE = Measured("a" * 64, 100, 1000, "mag titans"), Measured("b" * 64, 200, 2000, "mag titans")
CONTROL = Measured("c" * 64, 300, 3000, "swa")
EVIL = "<img src=x>&co"


def add(
    home: Path,
    run: str,
    measured: Measured,
    task: str,
    length: int,
    scores: list[float],
    *,
    first: int = 0,
    seed: int = 42,
    samples: str = "same",
    **detail: Any,
) -> None:
    piece, seconds = Piece(task, length, seed, first, len(scores)), len(scores) / 4
    result = Result(scores, samples, length * len(scores), seconds, 2_000_000_000, detail)
    assert Ledger(home / "runs" / run / "reports" / FILE).add(measured, piece, result)


def fill(home: Path) -> None:
    """A run with two checkpoints, a control that has less, and a run with a name that is markup."""
    for measured, scores in ((EARLY, [0.0, 0.0, 0.0, 1.0]), (LATE, [1.0, 1.0, 0.0, 1.0])):
        add(home, "mine", measured, "niah_single_1", 2048, scores, depths=[[0.1], [0.15], [0.5], [1.0]])
    add(home, "mine", LATE, "niah_single_1", 512, [0.0, 1.0], depths=[[0.3], [0.3]])
    losses = [{"0": 1.0, "1": 2.0, "2": 6.0, "4": 4.0}, {"0": 3.0, "1": 4.0, "2": 8.0, "4": 6.0}]
    add(home, "mine", LATE, "positions", 6, [13 / 6, 21 / 6], losses=losses, bytes_per_token=[4.0, 4.0])
    add(home, "mine", EARLY, "passkey", 512, [1.0], depths=[[0.5]])
    add(home, "swa", CONTROL, "niah_single_1", 2048, [0.0, 0.0, 0.0, 0.0], depths=[[0.1], [0.15], [0.5], [1.0]])
    add(home, EVIL, LATE, "niah_single_1", 2048, [1.0, 0.0, 0.0, 0.0], samples="others", output=["<script>"] * 4)


def config(home: Path, name: str = "mine", **evaluation: Any) -> Config:
    return Config(name=name, run_dir=str(home / "runs" / name), evaluation=EvaluationConfig(**evaluation))


class Page(HTMLParser):
    """The elements of a page, and its rows of cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.rows: list[tuple[str, list[str]]] = []
        self._open: list[str] = []
        self._row: str | None = None
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.elements.append((tag, given))
        if tag not in ("meta", "img"):
            self._open.append(tag)
        if tag == "tr":
            self.rows.append((given.get("class", ""), []))
        if tag in ("td", "th"):
            self.rows[-1][1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self._open):
            self.rows[-1][1][-1] += " " * ("small" in self._open) + data

    def named(self, begin: str, kind: str | None = None) -> list[list[str]]:
        """The rows that begin with a name; of one kind, if it is given."""
        return [
            [re.sub(r"\s+", " ", cell).strip() for cell in cells]
            for own, cells in self.rows
            if cells and cells[0].startswith(begin) and kind in (None, own)
        ]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    fill(home)
    assert report.write(config(home, control=["swa", EVIL])) == home / "runs" / "mine" / "reports" / "evaluation.html"
    return home


@pytest.fixture(scope="module")
def page(home: Path) -> Page:
    return Page((home / "runs" / "mine" / "reports" / "evaluation.html").read_text(encoding="utf-8"))


def table(home: Path, run: str = "mine") -> list[dict[str, str]]:
    with (home / "runs" / run / "reports" / "evaluation.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def numbers(home: Path, **wanted: str) -> list[float]:
    return [float(row["value"]) for row in table(home) if all(row[key] == value for key, value in wanted.items())]


def test_the_table_has_every_score_of_every_checkpoint(home: Path) -> None:
    own = {"run": "mine", "task": "niah_single_1", "part": "whole"}
    assert numbers(home, **own, step="100", length="2048") == [0.25]
    assert numbers(home, **own, step="200", length="2048") == [0.75]
    assert numbers(home, **own, step="200", length="512") == [0.5]
    (row,) = [row for row in table(home) if row["run"] == "mine" and row["value"] == "0.75" and row["part"] == "whole"]
    assert (row["trained_tokens"], row["checkpoint"], row["count"], row["seeds"]) == ("2000", "b" * 64, "4", "42")
    assert (row["tokens"], row["seconds"], row["peak_bytes"]) == ("8192", "1.0", "2000000000")
    for bound in (float(row["low"]), float(row["high"])):  # what makes an interval Wilson's
        assert abs(0.75 - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / 4), rel=1e-6)


def test_accuracy_by_depth(home: Path) -> None:
    own = {"run": "mine", "task": "niah_single_1", "step": "200", "length": "2048"}
    parts = {row["part"]: (float(row["value"]), row["count"]) for row in table(home) if own.items() <= row.items()}
    assert parts.pop("whole") == (0.75, "4")
    assert parts == {"depth 0% to 20%": (1.0, "2"), "depth 40% to 60%": (0.0, "1"), "depth 80% to 100%": (1.0, "1")}


def test_with_many_samples_depth_is_finer_and_of_several_places_the_first_counts(tmp_path: Path) -> None:
    add(tmp_path, "mine", LATE, "niah_multivalue", 512, [1.0] + [0.0] * 199, depths=[[0.05, 0.9]] + [[0.15]] * 199)
    report.write(config(tmp_path))
    assert numbers(tmp_path, part="depth 0% to 10%") == [1.0]
    assert numbers(tmp_path, part="depth 10% to 20%") == [0.0]


def test_loss_by_position_is_the_mean_over_tokens(home: Path, page: Page) -> None:
    wanted = {"position 0": 2.0, "position 1": 3.0, "position 2": 3.5, "position 4": 2.5}
    for part, loss in wanted.items():
        assert numbers(home, task="positions", part=part, metric="loss") == [loss]
        assert numbers(home, task="positions", part=part, metric="bits per byte") == [loss / math.log(2) / 4]
    at_4 = f"2.500 perplexity {math.exp(2.5):.1f}, {2.5 / math.log(2) / 4:.3f} bits per byte"
    assert page.named("4 to ") == [["4 to 5", at_4, "not measured", "not measured"]]
    (row,) = [row for row in page.named("mine", "own") if "perplexity" in row[1]]
    assert row[1].startswith("2.833 ") and row[1].endswith(
        f"n 2, perplexity {math.exp(17 / 6):.1f}, {17 / 6 / math.log(2) / 4:.3f} bits per byte"
    )


def test_the_interval_of_a_loss_is_students(home: Path) -> None:
    (row,) = [row for row in table(home) if (row["task"], row["part"], row["metric"]) == ("positions", "whole", "loss")]
    error = (21 / 6 - 13 / 6) / math.sqrt(2) / math.sqrt(2)  # the spread of two values over the root of their number
    assert float(row["high"]) - 17 / 6 == pytest.approx(17 / 6 - float(row["low"]))
    quantile = (float(row["high"]) - 17 / 6) / error
    assert quantile == pytest.approx(math.tan(math.pi * 0.475), rel=1e-4)  # of one degree of freedom: Cauchy's
    for degrees, wanted in enumerate(T, 1):  # 95 % of the density lie within
        t = np.linspace(0, wanted, 20001)
        density = (1 + t**2 / degrees) ** (-(degrees + 1) / 2) * math.gamma((degrees + 1) / 2)
        density /= math.sqrt(degrees * math.pi) * math.gamma(degrees / 2)
        assert 2 * np.trapezoid(density, t) == pytest.approx(0.95, abs=1e-4)


def test_a_cell_is_a_score_with_its_interval_or_says_that_there_is_none(page: Page) -> None:
    (row,) = [row for row in page.named("mine", "own") if "n 4" in row[-1]]
    assert row[0] == "mine mag titans, step 200, 2,000 tokens"
    assert re.fullmatch(r"50.0% \d+.\d to \d+.\d%, n 2", row[1])
    assert re.fullmatch(r"75.0% 30.1 to 95.4%, n 4", row[2])
    (control,) = [row for row in page.named("swa") if "n 4" in row[-1] and "step" in row[0]]
    assert control[1] == "not measured"
    assert control[2].startswith("0.0% ")


def test_a_task_is_told_of_the_newest_checkpoint_that_has_it(page: Page) -> None:
    assert [row for row in page.named("mine mag titans, step 100", "own")] == [
        ["mine mag titans, step 100, 1,000 tokens", "100.0% 20.7 to 100.0%, n 1"]
    ]


def test_a_step_that_is_asked_for_is_told_instead(home: Path, tmp_path: Path) -> None:
    fill(tmp_path)
    report.write(config(tmp_path, step=100))
    text = (tmp_path / "runs" / "mine" / "reports" / "evaluation.html").read_text()
    page = Page(text)
    (row,) = [row for row in page.named("mine", "own") if "n 4" in row[-1]]
    assert row[0] == "mine mag titans, step 100, 1,000 tokens" and row[1].startswith("25.0% ")
    assert "step 200" not in text


def test_published_rows_are_marked_and_only_of_lengths_that_were_measured(home: Path, page: Page) -> None:
    assert page.named("Titans MAG", "theirs") == [["Titans MAG publisheda", "not published", "99.4%"]]
    assert page.named("TTT") == page.named("TTT", "theirs") == [["TTT publisheda", "not published", "98.4%"]]
    assert "arXiv 2501.00663, Table 2" in page.text and "not measured here" in page.text
    theirs = [row for row in table(home) if row["source"] != "measured"]
    assert {row["model"] for row in theirs} >= {"Titans LMM", "Titans MAC", "Titans MAG", "Titans MAL", "DeltaNet"}
    assert all("Titans, arXiv 2501.00663" in row["source"] and not row["run"] for row in theirs)
    assert {(row["task"], row["length"]) for row in theirs} == {("niah_single_1", "2048")}
    assert {row["source"] for row in table(home) if row["run"]} == {"measured"}


def test_contradicting_figures_are_both_printed(tmp_path: Path) -> None:
    add(tmp_path, "mine", LATE, "niah_single_3", 16384, [1.0])
    page = Page(report.write(config(tmp_path)).read_text())
    rows = page.named("Titans LMM", "theirs")
    assert [(row[0], row[1]) for row in rows] == [
        ("Titans LMM publisheda", "80.6%"),
        ("Titans LMM, later publishedb", "21.0%"),
    ]
    assert "both are printed, neither is claimed" in page.text


def test_other_samples_are_flagged(home: Path, page: Page) -> None:
    comparable = {row["run"]: row["comparable"] for row in table(home) if row["part"] == "whole"}
    assert comparable["swa"] == "yes" and comparable[EVIL] == "no"
    (row,) = [row for row in page.named(EVIL) if "n 4" in row[-1] and "step" in row[0]]
    assert row[2].startswith("25.0% ≠ ")
    assert not any("≠" in cell for row in page.named("swa") for cell in row)
    assert "Not comparable with mine, as the samples are others: &lt;img src=x&gt;&amp;co in niah_single_1" in page.text


def test_the_control_is_named_and_its_absence_too(page: Page, tmp_path: Path) -> None:
    assert page.named("swa compared, attention alone")
    assert "No run here has attention alone" not in page.text
    add(tmp_path, "mine", LATE, "passkey", 512, [1.0])
    assert "No run here has attention alone" in report.write(config(tmp_path)).read_text()


def test_what_users_have_named_is_text_and_never_markup(page: Page) -> None:
    assert EVIL not in page.text and "&lt;img src=x&gt;&amp;co" in page.text
    assert "<script" not in page.text


def test_the_page_needs_nothing_but_itself(page: Page) -> None:
    anchors = {given["id"] for _, given in page.elements if "id" in given}
    for tag, given in page.elements:
        assert tag not in ("script", "link", "iframe", "object")
        if "src" in given:
            assert tag == "img" and given["src"].startswith("data:image/png;base64,")
        if "href" in given:
            assert given["href"][0] == "#" and given["href"][1:] in anchors
    assert not re.search(r"url\(|@import|https?://", page.text)


def test_every_picture_lies_beside_the_page_and_is_told_in_words(home: Path, page: Page) -> None:
    pictures = [given for tag, given in page.elements if tag == "img"]
    inside = sorted(base64.b64decode(given["src"].partition(",")[2]) for given in pictures)
    beside = sorted(file.read_bytes() for file in (home / "runs" / "mine" / "reports").glob("*.png"))
    assert inside == beside and all(content.startswith(b"\x89PNG") for content in inside)
    words = [given["alt"] for given in pictures]
    assert len(words) == len(set(words)) == 7  # length, depth, training; losses, positions; length, depth
    assert any("mine: 50% at 512, 75% at 2,048. swa: 0% at 2,048." in text for text in words)
    assert any("mine: 2.00 nats at position 0, 2.50 from 4 on." in text for text in words)
    assert any("mine: least 0%, at 2,048 tokens and a depth of 40% to 60%." in text for text in words)
    assert any("2 checkpoints, from 1,000 to 2,000 tokens" in text for text in words)


def test_how_it_was_measured(page: Page) -> None:
    rows = [row for row in page.named("mine") if row[1:3] == ["niah_single_1", "2,048"]]
    ((_, _, _, step, count, seeds, digest, tokens, speed, peak),) = rows
    assert (step, count, seeds, tokens, speed, peak) == ("200", "4", "42", "8,192", "8,192", "2.00 GB")
    assert re.fullmatch("[0-9a-f]{12}", digest)


def test_without_matplotlib_there_are_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    page = Page(report.write(config(tmp_path)).read_text())
    assert not [tag for tag, _ in page.elements if tag == "img"]
    assert page.named("Titans MAG", "theirs") and page.named("4 to 5")


def test_a_sample_counts_once_however_the_suites_have_cut_the_task(tmp_path: Path) -> None:
    add(tmp_path, "mine", LATE, "passkey", 512, [0.0, 0.0], depths=[[0.1], [0.1]])
    add(tmp_path, "mine", LATE, "passkey", 512, [0.0, 0.0, 1.0], depths=[[0.1], [0.1], [0.9]])
    add(tmp_path, "mine", LATE, "passkey", 512, [1.0, 1.0], first=2, depths=[[0.9], [0.9]])
    add(tmp_path, "mine", LATE, "passkey", 512, [1.0], seed=43, depths=[[0.9]])
    report.write(config(tmp_path))
    assert numbers(tmp_path, part="whole") == [pytest.approx(3 / 5)]
    assert numbers(tmp_path, part="depth 80% to 100%") == [1.0]
    (row,) = [row for row in table(tmp_path) if row["part"] == "whole"]
    assert (row["count"], row["seeds"]) == ("5", "42 43")


def test_the_headline_of_babilong_is_the_mean_of_all_five(tmp_path: Path) -> None:
    for number in range(1, 6):
        add(tmp_path, "mine", LATE, f"babilong_qa{number}", 1024, [1.0, float(number > 3)])
    add(tmp_path, "mine", LATE, "babilong_qa1", 2048, [1.0])
    page = Page(report.write(config(tmp_path)).read_text())
    assert numbers(tmp_path, task="babilong", run="mine") == [pytest.approx(0.7)]
    assert page.named("GPT-4", "theirs") == [["GPT-4 publisheda", "81.0%"]]


def test_tasks_without_a_length_are_told_by_their_own_metrics(tmp_path: Path) -> None:
    metrics = {"acc": {"value": 0.6666, "stderr": 0.27}, "acc_norm": {"value": 0.3333, "stderr": None}}
    detail = {"task_version": 1.0, "documents": 3, "of": 1838, "score": "acc"}
    add(tmp_path, "mine", LATE, "lm/piqa", 0, [1.0, 0.0, 1.0], metrics=metrics, **detail)
    # The first documents of the same task once more are no others.
    add(tmp_path, "mine", LATE, "lm/piqa", 0, [1.0], seed=1, metrics={"acc": {"value": 1.0, "stderr": None}}, **detail)
    page = Page(report.write(config(tmp_path)).read_text())
    assert page.named("lm/piqa acc") == [
        ["lm/piqa acc", "0.6666 ± 0.2700, n 3 of 1,838"],
        ["lm/piqa acc_norm", "0.3333 n 3 of 1,838"],
    ]
    assert page.named("Titans MAG, 340M", "theirs") == [["Titans MAG, 340M publisheda", "25.07", "28.72", "47.5%"]]


def test_every_task_says_what_it_asks_and_what_chance_is() -> None:
    assert all(about(name).text for name in tasks())
    assert about("mqar").chance == pytest.approx(1 / len(words("adjectives")), abs=1e-4)
    labels = len(strings("babilong")["qa1"]["labels"])
    assert about("babilong_qa2_finetuned").chance == pytest.approx(1 / labels, abs=1e-4)
    assert about("babilong_qa3").chance == about("babi_like_qa4").chance == 1 / (labels - 1)  # one is in the question
    assert about("unheard of").chance is None


def test_a_run_without_results_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^the run mine has no results; measure it first, as with titans-dist"):
        report.write(config(tmp_path))
    assert not list(tmp_path.iterdir())
    fill(tmp_path)
    with pytest.raises(UserError, match=r"^evaluation\.control names nobody, and the run nobody has no results"):
        report.write(config(tmp_path, control=["nobody"]))
    with pytest.raises(UserError, match=r"^the run mine has no results of step 7; it has those of step 100, 200$"):
        report.write(config(tmp_path, step=7))


def listed(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    out = capsys.readouterr().out
    return [[cell.strip() for cell in line.strip("│\n").split("│")] for line in out.splitlines() if line[:1] == "│"]


def test_ls_lists_checkpoints_tasks_and_lengths(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    assert main(["evaluate", "ls", "name=mine"]) == 0
    rows = listed(capsys)
    assert [row[:5] for row in rows] == [
        ["100", "1,000", "niah_single_1", "2,048", "4"],
        ["100", "1,000", "passkey", "512", "1"],
        ["200", "2,000", "niah_single_1", "512", "2"],
        ["200", "2,000", "niah_single_1", "2,048", "4"],
        ["200", "2,000", "positions", "6", "2"],
    ]
    assert rows[3][5:] == ["75.0%", "30.1% .. 95.4%", "42"]
    assert rows[4][5].startswith("2.833")

    chosen = ("evaluation.tasks=[niah_single_1]", "evaluation.lengths=[2048,4096]")
    assert main(["evaluate", "ls", "name=mine", *chosen]) == 0
    assert [row[0] for row in listed(capsys)] == ["100", "200"]
    assert main(["evaluate", "ls", "name=mine", "evaluation.step=100", *chosen]) == 0
    assert [row[5] for row in listed(capsys)] == ["25.0%"]
    assert main(["evaluate", "ls", "name=mine", "evaluation.tasks=[mqar]", "evaluation.lengths=[64]"]) == 0
    assert capsys.readouterr().out.startswith("mine has results, but none of")


def test_ls_and_report_of_a_run_without_results_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("ls", "report"):
        assert main(["evaluate", command, "name=never"]) == 1
        captured = capsys.readouterr()
        assert captured.err.startswith("titans-dist: the run never has no results; ") and captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_report_is_written_anew_without_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    ledger = Ledger(tmp_path / "runs" / "mine" / "reports" / FILE)
    before = ledger.rows()
    assert main(["evaluate", "report", "name=mine", "evaluation.control=[swa]"]) == 0
    assert capsys.readouterr().out == "report: runs/mine/reports/evaluation.html\n"
    assert "attention alone" in (tmp_path / "runs" / "mine" / "reports" / "evaluation.html").read_text()
    assert ledger.rows() == before
