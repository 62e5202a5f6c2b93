"""`titans-dist evaluate`: held-out loss of a run's newest checkpoint, or the tasks of a suite."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from titans_dist.config import CheckpointError, Config
from titans_launch import local, tables, worker
from titans_launch.checkpoint import opened

if TYPE_CHECKING:
    from titans_dist.evaluation.summary import Line, Metric


def run(config: Config, follow: bool = False) -> int:
    """Evaluate, as a worker or as the launcher of workers on this machine; a suite as the driver of Ray's workers."""
    if follow:
        from titans_launch import follow as following

        return following.run(config)
    run_dir = Path(config.run_dir)
    if not worker.is_worker():
        if not (run_dir / "checkpoints").is_dir():
            raise CheckpointError(
                f"{tables.place(run_dir)} has no checkpoint to evaluate; train it first, or give the name=NAME and "
                "the overrides it was trained with"
            )
        return suite(config) if config.evaluation.tasks else local.launch("evaluate", config)
    worker.enter(run_dir, "evaluate")
    from titans_dist import evaluation

    result = evaluation.evaluate(config)
    if worker.rank() == 0:
        show(result, run_dir)
    return 0


def suite(config: Config) -> int:
    """Measure what is missing of a suite, show all of it, and write the report."""
    from titans_dist.evaluation import report
    from titans_dist.evaluation.driver import measure
    from titans_dist.evaluation.summary import lines, metrics

    report.others(config)  # raises for what would be missed after the work is done
    rows = measure(config, lambda line: print(line, flush=True))
    table = Table(title=f"{config.name} at step {rows[0].measured.step:,}" if rows else "nothing", title_justify="left")
    for name in ("task", "tokens of context", "samples", "score", "95% interval", "tokens/s", "peak memory"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for line in lines(rows):
        peak, speed = opened.size(line.peak_bytes), line.tokens / line.seconds
        length = f"{line.length:,}" if line.length else "-"
        table.add_row(line.task, length, str(line.count), *score(line), f"{speed:,.0f}", peak)
    tables.console().print(table)
    of_harness(metrics(rows))
    write_report(config)
    return 0


def of_harness(found: list[Metric]) -> None:
    """Print what lm-evaluation-harness makes of its tasks, if there are any."""
    if not found:
        return
    table = Table(title="by lm-evaluation-harness", title_justify="left")
    for name in ("task", "version", "documents", "metric", "value", "standard error"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for one in found:
        stderr = "-" if one.stderr is None else f"{one.stderr:.4f}"
        documents = f"{one.documents:,} of {one.of:,}"
        table.add_row(one.task, one.version, documents, one.name, f"{one.value:.4f}", stderr)
    tables.console().print(table)


def score(line: Line) -> tuple[str, str]:
    """A score and its interval."""
    form = ".3f" if line.is_loss else ".1%"
    return f"{line.mean:{form}}", f"{line.low:{form}} .. {line.high:{form}}"


def write_report(config: Config) -> None:
    """Write the report of all that was measured, and say where it lies."""
    from titans_dist.evaluation import report

    path = report.write(config)
    without = "" if find_spec("matplotlib") else "; no pictures without matplotlib: install titans-dist[plot]"
    print(f"report: {tables.place(path)}{without}")


def show(result: dict[str, Any], run_dir: Path) -> None:
    """Print the table of one evaluation."""
    read = [f"{result[key]:,} {key}" for key in ("sequences", "tokens", "bytes") if result[key] is not None]
    tables.show(
        f"held-out text at step {result['step']}",
        [
            ("loss", f"{result['loss']:.4f} nats per token"),
            ("bits per byte", bits_per_byte(result)),
            ("perplexity", f"{result['perplexity']:.2f}"),
            ("read", ", ".join(read)),
            ("time", f"{result['seconds']:.1f} s"),
            ("checkpoint", tables.place(Path(result["checkpoint"]))),
            ("report", tables.place(run_dir / "reports" / "heldout.json")),
        ],
    )


def bits_per_byte(result: dict[str, Any]) -> str:
    """The number, or why there is none."""
    bits = result["bits_per_byte"]
    return "unknown (tokens without a text)" if bits is None else f"{bits:.4f}"
