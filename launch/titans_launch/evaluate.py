"""`titans-dist evaluate`: held-out loss of a run's newest checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from titans_dist.config import CheckpointError, Config
from titans_launch import local, tables, worker


def run(config: Config) -> int:
    """Evaluate, as a worker or as the launcher of workers on this machine."""
    run_dir = Path(config.run_dir)
    if not worker.is_worker():
        if not (run_dir / "checkpoints").is_dir():
            raise CheckpointError(
                f"{tables.place(run_dir)} has no checkpoint to evaluate; train it first, or give the name=NAME and "
                "the overrides it was trained with"
            )
        return local.launch("evaluate", config)
    worker.redirect(run_dir, "evaluate")
    from titans_dist import evaluation

    result = evaluation.evaluate(config)
    if worker.rank() == 0:
        show(result, run_dir)
    return 0


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
