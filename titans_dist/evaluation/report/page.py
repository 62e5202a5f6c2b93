"""What stands on the report's page, and the page: one file of HTML that needs nothing else."""

from __future__ import annotations

import base64
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from titans_dist.evaluation.measure import POSITIONS
from titans_dist.evaluation.report import published
from titans_dist.evaluation.report.runs import Results, by_position
from titans_dist.evaluation.report.table import comparable
from titans_dist.evaluation.summary import Line, bits_per_byte, bytes_per_token, lines, metrics, perplexity
from titans_dist.evaluation.tasks import about

NOT_MEASURED = "not measured"
OTHER_SAMPLES = "other samples than those of this run: not comparable"
PNG_DPI = 160
"""Of the pictures; a page has 96."""


@dataclass(frozen=True)
class Picture:
    """A drawing, within the page."""

    data: str
    alt: str
    """What it shows, in words."""
    width: int
    height: int


@dataclass(frozen=True)
class Cell:
    """One number of a table, or why there is none."""

    value: str | None = None
    under: str = NOT_MEASURED
    flag: str = ""


@dataclass(frozen=True)
class TableRow:
    """A run, a row of a paper, or a stretch of positions."""

    name: str
    cells: list[Cell]
    under: str = ""
    kind: str = ""
    """own: of the report's run. theirs: of a paper."""
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """A table, its head included."""

    head: list[str]
    rows: list[TableRow]
    caption: str = ""


@dataclass
class Section:
    """All of one task."""

    title: str
    about: str
    pictures: list[Picture]
    tables: list[Table]
    notes: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """Where links to it lead."""
        return "task-" + "".join(letter if letter.isalnum() else "-" for letter in self.title)


def page(runs: Sequence[Results], sections: Sequence[Section], csv: str) -> str:
    """The HTML of the report; everything that a user has named is escaped."""
    import jinja2

    own = runs[0]
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True).from_string(
        (files(__package__) / "page.html").read_text(encoding="utf-8")
    )
    return template.render(
        name=own.name,
        model=own.model,
        written=time.strftime("%Y-%m-%d %H:%M"),
        csv=csv,
        runs=[_run(run, own) for run in runs],
        overview=_overview(own, sections),
        sections=sections,
        notes=_notes(runs),
        measured=[row for run in runs for row in _measured(run, own)],
    )


def picture(path: Path, alt: str) -> Picture:
    """A PNG file as a part of the page."""
    content = path.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    data = "data:image/png;base64," + base64.b64encode(content).decode()
    return Picture(data, alt, round(width * 96 / PNG_DPI), round(height * 96 / PNG_DPI))


def section(runs: Sequence[Results], task: str, pictures: list[Picture]) -> Section:
    """One task: its pictures, and a table of all runs by length with the papers' rows below."""
    known = about(task)
    text = known.text[:1].upper() + known.text[1:] + "." if known.text else ""
    if known.chance is not None:
        text += f" Chance: {_percent(known.chance)}."
    lengths = sorted({length for run in runs for length in run.lines(task)})
    rows = [_of_run(run, runs[0], task, lengths) for run in runs]
    sources: list[str] = []
    for row in published.accuracy(task, lengths):
        if str(row.source) not in sources:
            sources.append(str(row.source))
        cells = [
            Cell(_percent(row.accuracy[length]), "") if length in row.accuracy else Cell(under="not published")
            for length in lengths
        ]
        rows.append(TableRow(row.model, cells, kind="theirs", mark="abcdefgh"[sources.index(str(row.source))]))
    head = ["run", *(f"{length:,}" if length else "score" for length in lengths)]
    found = Section(task, text, pictures, [Table(head, rows)], sources=sources)
    if any(cell.flag for row in rows for cell in row.cells):
        found.notes.append(f"≠ {OTHER_SAMPLES}.")
    return found


def positions(runs: Sequence[Results], pictures: list[Picture]) -> Section:
    """Losses and perplexities by length of the context and by position."""
    found = section(runs, POSITIONS, pictures)
    found.about = (
        "Loss on the held-out text in nats per token, perplexity and bits per byte, by the length of the context and "
        "by the position in it. Between models with different tokenizers only bits per byte are comparable."
    )
    columns = []
    longest = max(length for run in runs for length in run.lines(POSITIONS))
    for run in runs:
        length = max(run.lines(POSITIONS), default=0)
        name = f"{run.name}, {length:,}" if length else run.name
        found_there = run.chosen(POSITIONS)
        columns.append((name, by_position(found_there, length), bytes_per_token(found_there)))
    begins = sorted({begin for _, column, _ in columns for begin in column})
    rows = [
        TableRow(
            f"{begin:,}" if begin < 2 else f"{begin:,} to {min(2 * begin, longest) - 1:,}",
            [_loss(each.get(begin), per_token) for _, each, per_token in columns],
        )
        for begin in begins
    ]
    caption = "Loss by position in the longest context of each run."
    found.tables.append(Table(["position", *(name for name, *_ in columns)], rows, caption))
    return found


def language(runs: Sequence[Results], tasks: Sequence[str]) -> Section:
    """Tasks that have no length of the context, and the papers' table of language modeling."""
    rows = []
    for task in tasks:
        found = [_metrics(run, task) for run in runs]
        for metric in dict.fromkeys(name for each in found for name in each):
            flags = [_flag(runs[0], run.lines(task).get(0), run) for run in runs]
            cells = [
                Cell(*each[metric], flag) if metric in each else Cell() for each, flag in zip(found, flags, strict=True)
            ]
            rows.append(TableRow(f"{task} {metric}", cells))
    theirs, sources = [], []
    for row in published.language():
        if str(row.source) not in sources:
            sources.append(str(row.source))
        values = [f"{x:.2f}" if x else None for x in (row.wikitext_perplexity, row.lambada_perplexity)]
        values.append(None if row.common_sense is None else _percent(row.common_sense))
        cells = [Cell(value, "" if value else "not published") for value in values]
        theirs.append(TableRow(row.model, cells, kind="theirs", mark="ab"[sources.index(str(row.source))]))
    tables = [
        Table(["task and metric", *(run.name for run in runs)], rows),
        Table(["model", "WikiText perplexity", "LAMBADA perplexity", "mean accuracy of eight tasks"], theirs),
    ]
    text = (
        "Tasks without a length of the context, by lm-evaluation-harness: its own metrics with their standard errors."
    )
    return Section("common sense", text, [], tables, sources=sources)


def _metrics(run: Results, task: str) -> dict[str, tuple[str, str]]:
    """What the harness makes of a task: metric -> its value, and its standard error and the documents."""
    found = {}
    for one in metrics(run.chosen(task)):
        error = "" if one.stderr is None else f"± {one.stderr:.4f}, "
        found[one.name] = f"{one.value:.4f}", f"{error}n {one.documents:,} of {one.of:,}"
    return found


def _of_run(run: Results, own: Results, task: str, lengths: Sequence[int]) -> TableRow:
    found = run.lines(task)
    cells = [_cell(found.get(length), run, own) for length in lengths]
    return TableRow(run.name, cells, _checkpoint(run, task), "own" if run is own else "")


def _cell(line: Line | None, run: Results, own: Results) -> Cell:
    if line is None:
        return Cell()
    flag = _flag(own, line, run)
    if line.is_loss:
        under = f"{line.low:.3f} to {line.high:.3f}, n {line.count}" if line.count > 1 else "n 1, no interval"
        return Cell(f"{line.mean:.3f}", f"{under}, {_as_perplexity(line.mean, line.bytes_per_token)}", flag)
    return Cell(_percent(line.mean), f"{100 * line.low:.1f} to {_percent(line.high)}, n {line.count}", flag)


def _flag(own: Results, line: Line | None, run: Results) -> str:
    return OTHER_SAMPLES if line is not None and comparable(own, line, run) == "no" else ""


def _loss(value: float | None, per_token: float | None) -> Cell:
    return Cell() if value is None else Cell(f"{value:.3f}", _as_perplexity(value, per_token))


def _checkpoint(run: Results, task: str) -> str:
    rows = run.chosen(task)
    if not rows:
        return run.model
    measured = rows[0].measured
    return f"{measured.model}, step {measured.step:,}, {measured.trained_tokens:,} tokens"


def _run(run: Results, own: Results) -> dict[str, Any]:
    newest = max((run.chosen(task)[-1] for task in run.tasks if run.chosen(task)), key=lambda row: row.measured.step)
    role = "this run" if run is own else "compared"
    if run.is_control:
        role += ", attention alone"
    measured = newest.measured
    return {
        "name": run.name,
        "role": role,
        "model": measured.model,
        "step": f"{measured.step:,}",
        "trained": f"{measured.trained_tokens:,}",
        "checkpoint": measured.checkpoint,
    }


def _overview(own: Results, sections: Sequence[Section]) -> dict[str, Any]:
    """Scores of the report's run alone."""
    shown = [each for each in sections if each.title in own.tasks and each.title != POSITIONS]
    lengths = sorted({length for each in shown for length in own.lines(each.title)})
    rows = []
    for each in shown:
        found, chance = own.lines(each.title), about(each.title).chance
        cells = [
            {"value": _percent(found[length].mean), "shade": f"{0.45 * found[length].mean:.2f}"}
            if length in found
            else None
            for length in lengths
        ]
        rows.append(
            {
                "task": each.title,
                "anchor": each.anchor,
                "cells": cells,
                "chance": "unknown" if chance is None else _percent(chance),
            }
        )
    return {"lengths": [f"{length:,}" for length in lengths], "rows": rows}


def _measured(run: Results, own: Results) -> list[dict[str, Any]]:
    found = []
    for task in run.tasks:
        rows = run.chosen(task)
        for line in lines(rows):
            found.append(
                {
                    "own": run is own,
                    "run": run.name,
                    "task": task,
                    "length": f"{line.length:,}" if line.length else "",
                    "step": f"{rows[0].measured.step:,}",
                    "count": f"{line.count:,}",
                    "seeds": ", ".join(map(str, line.seeds)),
                    "samples": line.samples,
                    "differs": comparable(own, line, run) == "no",
                    "tokens": f"{line.tokens:,}",
                    "speed": f"{line.tokens / line.seconds:,.0f}" if line.seconds else "",
                    "peak": f"{line.peak_bytes / 1e9:.2f} GB",
                }
            )
    return found


def _notes(runs: Sequence[Results]) -> list[str]:
    own = runs[0]
    notes = [
        "Tokens are counted with the model's own tokenizer, those of prompt and answer together. Nothing is ever cut "
        "off: what does not fit into a length is refused.",
        "Intervals are of 95%: Wilson's for shares of right answers, Student's, over stretches of text, for losses.",
        "Chance is how often one is right who knows the task, has not read the context, and guesses.",
        "Depth is where that begins which the answer rests on: the share of the prompt's tokens before it; where there "
        "are several places, the first counts.",
        "Two results of a task are comparable where the digests of their samples are the same; the digest is of the "
        "questions themselves, and of how they were shared out.",
        "Peak memory is the largest that the worker had had when the task was done, with all that came before it.",
    ]
    differ = [
        f"{run.name} in {task} at {line.length:,}"
        for run in runs[1:]
        for task in run.tasks
        for line in run.lines(task).values()
        if comparable(own, line, run) == "no"
    ]
    if differ:
        notes.append(f"Not comparable with {own.name}, as the samples are others: {'; '.join(differ)}.")
    elif len(runs) > 1:
        notes.append(f"Where other runs were measured as {own.name} was, the samples are the same.")
    if not any(run.is_control for run in runs):
        notes.append(
            "No run here has attention alone. Without such a control (evaluation.control) nobody can tell what the "
            "memory has recalled and what the attention."
        )
    return notes


def _percent(share: float) -> str:
    """Such as 93.8%, or <0.1% where that would read as never."""
    return "<0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def _as_perplexity(loss: float, per_token: float | None) -> str:
    """The same as perplexity, and as bits per byte of the text where its bytes are known."""
    bits = f", {bits_per_byte(loss, per_token):.3f} bits per byte" if per_token else ""
    return f"perplexity {perplexity(loss):,.1f}{bits}"
