"""`titans-dist evaluate ls`: what is in a run's ledger, as a table."""

from __future__ import annotations

from rich.table import Table

from titans_dist.config import Config
from titans_launch import tables
from titans_launch.evaluate import score

COLUMNS = ("step", "trained on", "task", "context", "samples", "score", "95% interval", "seeds")


def run(config: Config) -> None:
    """List results by checkpoint, task and length; of evaluation.tasks, evaluation.lengths and evaluation.step alone
    where they are given."""
    from titans_dist.evaluation.report import read
    from titans_dist.evaluation.summary import lines

    wanted = config.evaluation
    (results, *_) = read(config)
    table = Table(title=f"results of {config.name}", title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "task" else "right")
    found = [
        (measured, line)
        for task in results.tasks
        for measured, rows in results.checkpoints(task).items()
        for line in lines(rows)
        if wanted.step in (None, measured.step)
        and (not wanted.tasks or task in wanted.tasks)
        and (not line.length or not wanted.lengths or line.length in wanted.lengths)
    ]
    for measured, line in sorted(found, key=lambda each: each[0].step):
        table.add_row(
            f"{measured.step:,}",
            f"{measured.trained_tokens:,}",
            line.task,
            f"{line.length:,}" if line.length else "-",
            f"{line.count:,}",
            *score(line),
            ", ".join(map(str, line.seeds)),
        )
    if table.row_count:
        tables.console().print(table)
    else:
        print(f"{config.name} has results, but none of the evaluation.tasks and evaluation.lengths that are asked for")
