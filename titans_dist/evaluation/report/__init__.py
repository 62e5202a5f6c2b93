"""The report of a run's evaluation: a page, its pictures and a table of all numbers, made of ledgers alone."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from titans_dist.config import Config
from titans_dist.evaluation.measure import POSITIONS
from titans_dist.evaluation.report import page, table
from titans_dist.evaluation.report.runs import Results, others, read

__all__ = ["others", "read", "write"]

NAME = "evaluation"


def write(config: Config) -> Path:
    """Write reports/evaluation.html, .csv and, with matplotlib, PNG files of the run; the path of the page.

    Raises UserError where the run, or one that evaluation.control names, has no results.
    """
    runs = read(config)
    folder = Path(config.run_dir) / "reports"
    table.write(runs, folder / f"{NAME}.csv")
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    without_length = [task for task in tasks if not any(any(run.lines(task)) for run in runs)]
    sections = []
    for task in tasks:
        if task in without_length:
            continue
        pictures = _draw(runs, task, folder) if find_spec("matplotlib") else []
        sections.append(page.positions(runs, pictures) if task == POSITIONS else page.section(runs, task, pictures))
    if without_length:
        sections.append(page.language(runs, without_length))
    path = folder / f"{NAME}.html"
    path.write_text(page.page(runs, sections, f"{NAME}.csv"), encoding="utf-8")
    return path


def _draw(runs: list[Results], task: str, folder: Path) -> list[page.Picture]:
    from titans_dist.evaluation.report import figures

    def place(kind: str) -> Path:
        safe = "".join(letter if letter.isalnum() or letter in "_-" else "-" for letter in task)
        return folder / f"{NAME}-{safe}-{kind}.png"

    drawn: list[tuple[Path, str | None]] = []
    if task == POSITIONS:
        drawn.append((place("lengths"), figures.losses(runs, place("lengths"))))
        drawn.append((place("position"), figures.positions(runs, place("position"))))
    else:
        drawn.append((place("lengths"), figures.accuracy(runs, task, place("lengths"))))
    drawn.append((place("training"), figures.training(runs[0], task, place("training"))))
    drawn.append((place("depths"), figures.depths(runs, task, place("depths"))))
    return [page.picture(path, alt) for path, alt in drawn if alt is not None]
