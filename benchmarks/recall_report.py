"""The results of `recall`: a table on the console and in recall.md, numbers in recall.json, curves in recall.png."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from recall_task import MODELS, Task, model_config, reach
from timing import show

if TYPE_CHECKING:
    from recall import Run, Training

COLUMNS = ("model", "accuracy, mean ± spread", "each seed", "parameters", "tokens", "seconds")


def report(runs: Sequence[Run], task: Task, training: Training, seconds: float, folder: Path) -> None:
    """Show the table and write all three files."""
    title = describe(task, training, seconds)
    rows = table(runs, task)
    show(title, COLUMNS, rows)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1)), *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    (folder / "recall.md").write_text(f"{title}\n\n{text}\n", encoding="utf-8")
    results = {
        "task": {**asdict(task), "length": task.length, "reach": reach(), "chance": task.chance},
        "training": asdict(training),
        "models": {name: asdict(model_config(name, task)) for name in dict.fromkeys(run.model for run in runs)},
        "runs": [asdict(run) for run in runs],
        "seconds": seconds,
    }
    (folder / "recall.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot(runs, task, folder / "recall.png")
    print(f"Written: {', '.join(str(folder / f'recall.{ending}') for ending in ('md', 'json', 'png'))}")


def describe(task: Task, training: Training, seconds: float) -> str:
    """What was done, in two sentences."""
    return (
        f"Associative recall: {task.pairs} pairs of {task.keys} keys and {task.values} values, asked for at least "
        f"{task.gap + 1} tokens later, where attention's layers reach {reach()}. {training.steps} steps of "
        f"{training.batch} sequences of {task.length} tokens; {training.tested} unseen sequences; {seconds / 60:.0f} "
        "minutes in all."
    )


def table(runs: Sequence[Run], task: Task) -> list[list[str]]:
    """A row per model, and one of what to expect from a model that knows nothing."""
    rows = []
    for name in dict.fromkeys(run.model for run in runs):
        own = [run for run in runs if run.model == name]
        right = [run.accuracy for run in own]
        rows.append(
            [
                MODELS[name][0],
                f"{statistics.mean(right):.1%}" + (f" ± {100 * statistics.stdev(right):.1f}" if len(right) > 1 else ""),
                ", ".join(f"{100 * x:.1f}" for x in right),
                f"{own[0].parameters:,}",
                f"{own[0].tokens:,}",
                f"{statistics.mean(run.seconds for run in own):.0f}",
            ]
        )
    return [*rows, ["chance", f"{task.chance:.1%}", "", "", "", ""]]


def plot(runs: Sequence[Run], task: Task, path: Path) -> None:
    """Accuracy over tokens: the mean over seeds as a line, all seeds as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name in dict.fromkeys(run.model for run in runs):
        curves = [run.curve for run in runs if run.model == name]
        tokens = [point[0] / 1e6 for point in curves[0]]
        right = list(zip(*([100 * point[2] for point in curve] for curve in curves), strict=True))
        axes.plot(tokens, [statistics.mean(x) for x in right], label=MODELS[name][0])
        axes.fill_between(tokens, [min(x) for x in right], [max(x) for x in right], alpha=0.15)
    axes.axhline(100 * task.chance, color="gray", linestyle=":", label="chance")
    axes.set(xlabel="training tokens, millions", ylabel="queries answered right, %", ylim=(0, 102))
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
