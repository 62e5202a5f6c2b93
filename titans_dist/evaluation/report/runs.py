"""What the ledgers of a run and of those beside it know."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from titans_dist.config import Config, UserError
from titans_dist.config.model import ATTENTION_VARIANTS
from titans_dist.evaluation.ledger import FILE, Ledger, Measured, Row
from titans_dist.evaluation.summary import Line, lines, once

SHAPES = ("qa1", "qa2", "qa3", "qa4", "qa5")
DEPTH_BINS = 5
"""Parts of a context, from its beginning to its end, that accuracy is told of; twice as many from MANY samples on."""
MANY = 200


@dataclasses.dataclass(frozen=True)
class Results:
    """All that was measured of a run."""

    name: str
    rows: Sequence[Row]
    """Each sample of each checkpoint once."""
    step: int | None = None
    """The checkpoint that the report is about. None: of each task the newest that was measured."""

    @property
    def tasks(self) -> list[str]:
        """In the order in which they were first measured."""
        return list(dict.fromkeys(row.piece.task for row in self.rows))

    @property
    def model(self) -> str:
        """Such as mag titans."""
        return self.rows[-1].measured.model

    @property
    def is_control(self) -> bool:
        """Whether it has attention and no memory."""
        return self.model.split()[0] in ATTENTION_VARIANTS

    def checkpoints(self, task: str) -> dict[Measured, list[Row]]:
        """The rows of a task by checkpoint, in the order of training."""
        found: dict[Measured, list[Row]] = defaultdict(list)
        for row in self.rows:
            if row.piece.task == task:
                found[row.measured].append(row)
        return {each: found[each] for each in sorted(found, key=lambda each: (each.step, found[each][-1].time))}

    def chosen(self, task: str) -> list[Row]:
        """The rows of a task that the report is about; all of one checkpoint, or none."""
        there = [rows for each, rows in self.checkpoints(task).items() if self.step in (None, each.step)]
        return there[-1] if there else []

    def lines(self, task: str) -> dict[int, Line]:
        """The chosen results of a task by length."""
        return {line.length: line for line in lines(self.chosen(task))}


def read(config: Config) -> list[Results]:
    """The run's results, and those of the runs beside it. Raises UserError where one of them has none."""
    step = config.evaluation.step
    return [Results(config.name, _rows(Path(config.run_dir), step), step), *others(config)]


def others(config: Config) -> list[Results]:
    """The results of the runs that evaluation.control names. Raises UserError where one of them has none."""
    names = [name for name in dict.fromkeys(config.evaluation.control) if name != config.name]
    runs = Path(config.run_dir).parent
    return [Results(name, _rows(runs / name, why=f"evaluation.control names {name}, and ")) for name in names]


def _rows(run_dir: Path, step: int | None = None, why: str = "") -> list[Row]:
    path = run_dir / "reports" / FILE
    rows = once(Ledger(path).rows()) if path.is_file() else []
    rows = [row for row in rows if row.result.scores]
    if not rows:
        raise UserError(
            f"{why}the run {run_dir.name} has no results; measure it first, as with titans-dist evaluate "
            f"suite=offline name={run_dir.name}"
        )
    if step is not None and all(row.measured.step != step for row in rows):
        steps = ", ".join(f"{at:,}" for at in sorted({row.measured.step for row in rows}))
        raise UserError(f"the run {run_dir.name} has no results of step {step:,}; it has those of step {steps}")
    return rows + _means(rows)


def _means(rows: list[Row]) -> list[Row]:
    """The five tasks of BABILong as one, where all were measured with as many samples: the mean is the headline."""
    groups: dict[tuple[str, Measured, int, int], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for shape in SHAPES:
            family, middle, ending = row.piece.task.partition(f"_{shape}")
            if middle and ending in ("", "_finetuned"):
                groups[family + ending, row.measured, row.piece.length, row.piece.seed][shape].append(row)
    found = []
    for (name, *_), of_shape in groups.items():
        counts = {shape: sum(len(row.result.scores) for row in of_shape[shape]) for shape in SHAPES}
        if len(set(counts.values())) == 1:
            found += [
                dataclasses.replace(row, piece=dataclasses.replace(row.piece, task=name))
                for shape in SHAPES
                for row in of_shape[shape]
            ]
    return found


@dataclasses.dataclass(frozen=True)
class Depth:
    """Answers that rest on something in one part of the contexts of one length."""

    length: int
    begin: float
    end: float
    """Of the prompt's tokens, as shares."""
    count: int
    mean: float


def depth_bins(runs: Sequence[Results], task: str) -> int:
    """How many parts a context has: the same for all runs, as many as all of them have samples for."""
    counts = [line.count for run in runs for line in run.lines(task).values()]
    return 2 * DEPTH_BINS if min(counts, default=0) >= MANY else DEPTH_BINS


def by_depth(rows: Sequence[Row], bins: int) -> list[Depth]:
    """Accuracy by where the answer lies, of parts in which any does; of several places the first counts."""
    inside: dict[tuple[int, int], list[float]] = defaultdict(list)
    for row in rows:
        for depths, score in zip(row.result.detail.get("depths", []), row.result.scores, strict=False):
            if depths:
                inside[row.piece.length, min(int(depths[0] * bins), bins - 1)].append(score)
    return [
        Depth(length, part / bins, (part + 1) / bins, len(scores), sum(scores) / len(scores))
        for (length, part), scores in sorted(inside.items())
    ]


def by_position(rows: Sequence[Row], length: int) -> dict[int, float]:
    """Mean loss in nats per token by the first position of its bin, of all stretches of one length."""
    sums: dict[int, float] = defaultdict(float)
    count = 0
    for row in rows:
        if row.piece.length == length:
            for losses in row.result.detail.get("losses", []):
                count += 1
                for begin, loss in losses.items():
                    sums[int(begin)] += loss
    return {begin: sums[begin] / (count * (min(max(2 * begin, 1), length) - begin)) for begin in sorted(sums)}
