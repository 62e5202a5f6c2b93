"""The pictures of the report, as PNG files. matplotlib is needed, and nothing is shown on a screen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from titans_dist.evaluation.measure import POSITIONS
from titans_dist.evaluation.report.runs import Depth, Results, by_depth, by_position, depth_bins
from titans_dist.evaluation.summary import Line, lines
from titans_dist.evaluation.tasks import about

STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.constrained_layout.use": True,
    "font.size": 8.5,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "savefig.dpi": 160,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
}
COLORS = ("#14508c", "#d1660c", "#0b8a5f", "#a3317f", "#8a6d00", "#3aa0c9", "#7a4b2a")
"""Of runs, the report's own first: readable side by side, in print and by the color-blind."""
SUPTITLE: dict[str, Any] = {"fontsize": 9, "fontweight": "bold", "x": 0.01, "ha": "left"}
CHART = (5.5, 3.5)
"""Inches: two beside each other have room on the page."""
MOST_PANELS = 4


def accuracy(runs: Sequence[Results], task: str, path: Path) -> str:
    """Accuracy by length with 95 % intervals, a line for each run; what it shows, in words."""
    chance = about(task).chance
    with _figure(path, *CHART) as axes:
        _by_length(axes, runs, task, lambda value: 100 * value)
        if chance is not None and chance >= 0.001:
            axes.axhline(100 * chance, color="#777777", linestyle=":", linewidth=1.2, label=f"chance {chance:.1%}")
        axes.set(ylabel="right answers, %", ylim=(-3, 103), title="by length of the context")
        _legend(axes)
    return f"Accuracy of {task} by length of the context. " + _in_words(runs, task)


def losses(runs: Sequence[Results], path: Path) -> str:
    """Mean loss by length of the context with 95 % intervals; what it shows, in words."""
    with _figure(path, *CHART) as axes:
        _by_length(axes, runs, POSITIONS, lambda value: value)
        axes.set(ylabel="loss, nats per token", title="by length of the context")
        _legend(axes)
    return "Loss on the held-out text by length of the context. " + _in_words(runs, POSITIONS)


def positions(runs: Sequence[Results], path: Path) -> str:
    """Loss by position in the longest context of each run; what it shows, in words."""
    words = []
    with _figure(path, *CHART) as axes:
        for number, run in enumerate(runs):
            rows = run.chosen(POSITIONS)
            if not rows:
                continue
            length = max(row.piece.length for row in rows)
            found = by_position(rows, length)
            label = f"{run.name}, {_tokens(length)}"
            axes.plot([max(begin, 0.5) for begin in found], list(found.values()), label=label, **_look(number, run))
            first, last = min(found), max(found)
            words.append(
                f"{run.name}: {found[first]:.2f} nats at position {first:,}, {found[last]:.2f} from {last:,} on."
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: "0" if value < 1 else _tokens(round(value)))
        axes.set(xlabel="position in the longest context", ylabel="loss, nats per token")
        axes.set_title("by position")
        _legend(axes)
    return "Loss on the held-out text by position. " + " ".join(words)


def depths(runs: Sequence[Results], task: str, path: Path) -> str | None:
    """A heat map of accuracy by length and depth for each run; None, and no file, where no depths are known."""
    bins = depth_bins(runs, task)
    maps = [(run, by_depth(run.chosen(task), bins)) for run in runs]
    maps = [each for each in maps if each[1]][:MOST_PANELS]
    if not maps:
        return None
    all_lengths = sorted({depth.length for _, found in maps for depth in found})
    width = max(0.62 * len(all_lengths), 2.2)
    with _figure(path, max(len(maps) * (width + 0.1) + 1.1, 5.5), 0.42 * bins + 1.2, panels=len(maps)) as panels:
        for axes, (run, found) in zip(panels, maps, strict=True):
            _heat(axes, found, all_lengths, bins)
            axes.set_title(_short(run.name, round(11 * width)), fontweight="normal")
            axes.tick_params(labelleft=axes is panels[0])
        panels[0].set_ylabel("depth of the answer")
        panels[0].figure.suptitle("right answers in %, and of how many, by depth (gray: none)", **SUPTITLE)
    worst = [min(found, key=lambda depth: depth.mean) for _, found in maps]
    words = [
        f"{run.name}: least {depth.mean:.0%}, at {depth.length:,} tokens and a depth of {depth.begin:.0%} to "
        f"{depth.end:.0%}."
        for (run, _), depth in zip(maps, worst, strict=True)
    ]
    return f"Heat map of the accuracy of {task} by length of the context and depth of the answer. " + " ".join(words)


def training(run: Results, task: str, path: Path) -> str | None:
    """The scores of a run by the tokens it was trained on, a line for each length; None where one checkpoint is all."""
    found = [(each, lines(rows)) for each, rows in run.checkpoints(task).items()]
    if len(found) < 2:
        return None
    of_length: dict[int, list[tuple[int, Line]]] = {}
    for each, own in found:
        for line in own:
            of_length.setdefault(line.length, []).append((each.trained_tokens, line))
    scale = 1 if task == POSITIONS else 100
    with _figure(path, *CHART) as axes:
        import matplotlib

        shades = matplotlib.colormaps["viridis"]
        for number, length in enumerate(sorted(of_length)):
            points = of_length[length]
            color = shades(0.05 + 0.8 * number / max(len(of_length) - 1, 1))
            tokens = [at for at, _ in points]
            axes.plot(tokens, [scale * line.mean for _, line in points], "o-", color=color, label=_tokens(length))
            if task != POSITIONS:
                low, high = ([scale * getattr(line, end) for _, line in points] for end in ("low", "high"))
                axes.fill_between(tokens, low, high, color=color, alpha=0.12, linewidth=0)
        axes.set(xlabel="tokens trained on", title=f"over training, {_short(run.name)}")
        axes.set(ylabel="loss, nats per token" if task == POSITIONS else "right answers, %")
        if task != POSITIONS:
            axes.set_ylim(-3, 103)
        axes.xaxis.set_major_formatter(lambda value, _: _amount(value))
        _legend(axes, title="context")
    (first, _), (last, _) = found[0], found[-1]
    return (
        f"{task} of {run.name} at {len(found)} checkpoints, from {first.trained_tokens:,} to {last.trained_tokens:,} "
        "tokens of training."
    )


def _by_length(axes: Any, runs: Sequence[Results], task: str, scaled: Callable[[float], float]) -> None:
    lengths: set[int] = set()
    for number, run in enumerate(runs):
        own = run.lines(task)
        if not own:
            continue
        lengths |= own.keys()
        means = [scaled(line.mean) for line in own.values()]
        ends = [(scaled(line.low), scaled(line.high)) if math.isfinite(line.low) else None for line in own.values()]
        bars = [
            [mean - end[0] if end else 0.0 for mean, end in zip(means, ends, strict=True)],
            [end[1] - mean if end else 0.0 for mean, end in zip(means, ends, strict=True)],
        ]
        # Side by side, where their intervals would hide each other.
        at = [length * 1.03 ** (number - (len(runs) - 1) / 2) for length in own]
        look = _look(number, run)
        axes.errorbar(at, means, yerr=bars, capsize=2.5, elinewidth=1, label=_short(run.name), **look)
    axes.set_xscale("log", base=2)
    ticks = sorted(lengths)
    axes.set_xticks(ticks, [_tokens(length) for length in ticks])
    axes.minorticks_off()
    axes.set_xlim(ticks[0] / 1.35, ticks[-1] * 1.35)
    axes.set_xlabel("tokens of context")


def _heat(axes: Any, found: Sequence[Depth], lengths: list[int], bins: int) -> None:
    import numpy as np

    grid, counts = np.full((bins, len(lengths)), np.nan), np.zeros((bins, len(lengths)), int)
    for depth in found:
        at = round(depth.begin * bins), lengths.index(depth.length)
        grid[at], counts[at] = 100 * depth.mean, depth.count
    axes.set_facecolor("#eeeeee")
    axes.imshow(grid, vmin=0, vmax=100, cmap="YlGnBu", aspect="auto")
    for part in range(bins):
        for number in range(len(lengths)):
            if counts[part, number]:
                color = "white" if grid[part, number] > 55 else "#222222"
                place: dict[str, Any] = {"ha": "center", "va": "center", "color": color}
                axes.text(number, part - 0.12, f"{grid[part, number]:.0f}", fontsize=8.5, **place)
                axes.text(number, part + 0.27, f"of {counts[part, number]}", fontsize=6, alpha=0.8, **place)
    axes.set_xticks(range(len(lengths)), [_tokens(length) for length in lengths])
    axes.set_yticks(range(bins), [f"{part / bins:.0%} to {(part + 1) / bins:.0%}" for part in range(bins)])
    axes.set_xticks(np.arange(len(lengths) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(bins + 1) - 0.5, minor=True)
    axes.grid(False)
    axes.grid(True, which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("tokens of context")


@contextmanager
def _figure(path: Path, width: float, height: float, panels: int = 0) -> Iterator[Any]:
    """Axes to draw on, or a list of several beside each other; saved at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, panels or 1, figsize=(width, height), squeeze=False)
        try:
            yield list(axes[0]) if panels else axes[0][0]
            figure.savefig(path, metadata={"Software": None})
        finally:
            pyplot.close(figure)


def _legend(axes: Any, title: str | None = None) -> None:
    """Below the axes, so that they have the same size in all charts."""
    axes.figure.legend(loc="outside lower left", ncols=3, title=title, alignment="left", columnspacing=1.4)


def _look(number: int, run: Results) -> dict[str, Any]:
    """A run without a memory is drawn dashed."""
    return {"color": COLORS[number % len(COLORS)], "marker": "o", "linestyle": "--" if run.is_control else "-"}


def _in_words(runs: Sequence[Results], task: str) -> str:
    words = []
    for run in runs:
        own = run.lines(task).values()
        values = [f"{line.mean:.2f}" if line.is_loss else f"{line.mean:.0%}" for line in own]
        parts = [f"{value} at {line.length:,}" for value, line in zip(values, own, strict=True)]
        words.append(f"{run.name}: {', '.join(parts) if parts else 'not measured'}.")
    return " ".join(words)


def _short(name: str, most: int = 28) -> str:
    # A dollar sign would begin a formula.
    return (name if len(name) <= most else f"{name[: most - 1]}…").replace("$", r"\$")


def _tokens(length: int) -> str:
    """Such as 512, 16K or 2M.

    >>> [_tokens(length) for length in (512, 1536, 16384, 2 << 20)]
    ['512', '1.5K', '16K', '2M']
    """
    for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if length >= size:
            return f"{length / size:.3g}{unit}"
    return str(length)


def _amount(tokens: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:.3g}"
