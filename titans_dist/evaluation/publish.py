"""From the ledger to where the curves of a run are: evaluation.jsonl beside its metrics, and wandb."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from titans_dist.config import Config
from titans_dist.evaluation.ledger import Measured, Row
from titans_dist.evaluation.summary import lines
from titans_dist.evaluation.work import pieces
from titans_dist.run.folder import read_status
from titans_dist.tracking.evaluations import EVALUATIONS, Evaluations, for_wandb
from titans_dist.tracking.metrics import MetricsFile
from titans_dist.tracking.wandb_sink import WandbSink


class Publisher:
    """Writes each mean once, when all of its samples are measured. Not even a kill makes it write one twice."""

    def __init__(self, config: Config, run: Config) -> None:
        """`config`: what is measured. `run`: the run as it was started, which is what wandb knows."""
        self.folder, self.run = Path(config.run_dir), run
        self.wandb_id: str | None = None
        """The run's, as its checkpoints tell; None without wandb."""
        self._wanted: dict[tuple[str, int], set[str]] = defaultdict(set)
        for piece in pieces(config.evaluation):
            self._wanted[piece.task, piece.length].add(piece.key)
        self._file = MetricsFile(self.folder / EVALUATIONS)
        self._there = {
            (row["checkpoint"], row["task"], row["length"], row["samples"]) for row in Evaluations(self.folder).new()
        }
        self._wandb: WandbSink | None = None

    def publish(self, rows: Iterable[Row]) -> None:
        """Write what is whole and new of these rows of the ledger."""
        of_checkpoint: dict[Measured, list[Row]] = defaultdict(list)
        for row in rows:
            of_checkpoint[row.measured].append(row)
        for measured, found in of_checkpoint.items():
            self._of_checkpoint(measured, found)

    def close(self) -> None:
        """Close the file; finish the upload."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.close()

    def _of_checkpoint(self, measured: Measured, rows: list[Row]) -> None:
        keys = {row.piece.key for row in rows}
        whole = {key for wanted in self._wanted.values() if wanted <= keys for key in wanted}
        for line in lines(row for row in rows if row.piece.key in whole):
            place = (measured.checkpoint, line.task, line.length, line.count)
            if place in self._there:
                continue
            self._there.add(place)
            fields = {
                "tokens": measured.trained_tokens,
                "checkpoint": measured.checkpoint,
                "task": line.task,
                "length": line.length,
                "measures": "loss" if line.is_loss else "score",
                "samples": line.count,
                **{name: getattr(line, name) for name in ("mean", "low", "high")},
            }
            self._file.append("evaluation", measured.step, fields)
            self._to_wandb({"step": measured.step, **fields})

    def _to_wandb(self, row: dict[str, object]) -> None:
        """Unless training does: while it goes on it reads the file, and once more when it ends."""
        if self.wandb_id is None or read_status(self.folder) == "running":
            return
        if self._wandb is None:
            self._wandb = WandbSink(self.folder / "reports", self.run, self.wandb_id)
        self._wandb.log(for_wandb(row))
