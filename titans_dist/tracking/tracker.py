"""The one object the training loop tells its numbers to, on rank 0."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from titans_dist.config import Config
from titans_dist.tracking.console import Console, warn
from titans_dist.tracking.evaluations import Evaluations, for_wandb
from titans_dist.tracking.metrics import MetricsFile, StepRow
from titans_dist.tracking.wandb_sink import WandbSink


class Tracker:
    """Passes each row to metrics.jsonl, the console and wandb. No failure of any of them stops training."""

    def __init__(
        self, run_dir: Path, config: Config, *, resumed_step: int | None = None, wandb_id: str | None = None
    ) -> None:
        """`resumed_step`: the step of the checkpoint a restarted run goes on from; it is logged as event `resume`.

        `wandb_id`: the `wandb_id` of the earlier Tracker, as kept in the checkpoint.
        """
        self._metrics = MetricsFile(run_dir / "metrics.jsonl")
        self._metrics_warned = False
        self._console = Console(config.training.steps, config.training.log_interval)
        self._wandb = WandbSink(run_dir, config, wandb_id) if config.tracking.wandb else None
        self._evaluations = Evaluations(run_dir)
        self._step = resumed_step or 0
        self._tokens = 0
        self._wandb_id = wandb_id
        if resumed_step is not None:
            self.event("resume", step=resumed_step)

    @property
    def wandb_id(self) -> str | None:
        """The id to resume the wandb run by; survives a start without wandb."""
        return self._wandb.run_id if self._wandb is not None else self._wandb_id

    def step(self, row: StepRow) -> None:
        """Record one optimizer step."""
        self._step, self._tokens = row.step, row.tokens
        fields = dataclasses.asdict(row)
        self._write("train", row.step, {key: value for key, value in fields.items() if key != "step"})
        self._console.step(row)
        if self._wandb is not None:
            self._wandb.log({key if key in ("step", "tokens") else f"train/{key}": fields[key] for key in fields})
            self._pass_on_evaluations(self._wandb)

    def memories(self, step: int, layers: dict[str, dict[str, Any]]) -> None:
        """Record how the neural memories were doing in `step`: what `titans_dist.layers.telemetry` found, by layer."""
        self._write("memory", step, {"layers": layers})
        if self._wandb is not None:
            flat = {f"memory/{path}/{name}": x for path, found in layers.items() for name, x in found.items()}
            self._wandb.log({"step": step, "tokens": self._tokens} | {k: x for k, x in flat.items() if x is not None})

    def event(self, name: str, **fields: Any) -> None:
        """Record something that happened beside the steps; `step` is the latest step unless given."""
        fields.setdefault("step", self._step)
        self._write("event", fields["step"], {"name": name, **{k: v for k, v in fields.items() if k != "step"}})
        self._console.event(name, fields)

    def evaluation(self, fields: dict[str, Any]) -> None:
        """Record the result of a held-out evaluation; `step` is the latest step unless given."""
        fields = {"step": self._step, **fields}
        self._write("evaluation", fields["step"], {k: v for k, v in fields.items() if k != "step"})
        self._console.event("evaluation", fields)
        if self._wandb is not None:
            numbers = {f"evaluation/{k}": v for k, v in fields.items() if isinstance(v, int | float) and k != "step"}
            self._wandb.log({"tokens": self._tokens, "step": fields["step"], **numbers})

    def close(self) -> None:
        """Close the files and finish the upload."""
        self._metrics.close()
        if self._wandb is not None:
            self._pass_on_evaluations(self._wandb)
            self._wandb.close()

    def _pass_on_evaluations(self, wandb: WandbSink) -> None:
        """Send what a follower has measured since, for it may not write to the same wandb run at the same time."""
        for row in self._evaluations.new():
            wandb.log(for_wandb(row))

    def _write(self, kind: str, step: int, fields: dict[str, Any]) -> None:
        try:
            self._metrics.append(kind, step, fields)
        except OSError as error:
            if not self._metrics_warned:
                warn(f"{self._metrics.path} cannot be written ({error}); training goes on and keeps trying")
                self._metrics_warned = True
