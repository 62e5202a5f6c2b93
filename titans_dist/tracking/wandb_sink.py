"""Weights & Biases beside metrics.jsonl. It may fail in any way at any time; the run goes on without it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from titans_dist.config import Config
from titans_dist.tracking.console import warn

INIT_TIMEOUT_S = 60


class WandbSink:
    """One wandb run, taken up again under the same id after a restart; its x-axis is tokens, not calls."""

    def __init__(self, run_dir: Path, config: Config, run_id: str | None) -> None:
        self.run_id = run_id
        self._run: Any = None
        self._guarded("start", lambda: self._start(run_dir, config))

    def log(self, fields: dict[str, Any]) -> None:
        """Send one row; `fields` holds `tokens`, the x-axis. A field that is a dict is a histogram: see telemetry."""
        if self._run is not None:
            self._guarded("log", lambda: self._run.log({key: _histogram(value) for key, value in fields.items()}))

    def close(self) -> None:
        """Finish the upload."""
        if self._run is not None:
            self._guarded("finish", lambda: self._run.finish())
        self._run = None

    def _start(self, run_dir: Path, config: Config) -> None:
        import wandb  # optional, and slow to import

        self._run = wandb.init(
            project=config.tracking.project,
            entity=config.tracking.entity,
            name=config.name,
            id=self.run_id,
            resume="allow",
            dir=run_dir,
            config=dataclasses.asdict(config),
            # `silent`: its banner would break the columns of the console.
            settings=wandb.Settings(init_timeout=INIT_TIMEOUT_S, silent=True),
        )
        self._run.define_metric("tokens", hidden=True)
        self._run.define_metric("*", step_metric="tokens")
        self.run_id = self._run.id

    def _guarded(self, what: str, call: Callable[[], Any]) -> None:
        # SystemExit too: some wandb versions leave that way when they find no API key.
        try:
            call()
        except (Exception, SystemExit) as error:
            self._run = None
            reason = str(error).strip().splitlines() or [""]
            warn(
                f"wandb could not {what} ({type(error).__name__}: {reason[0]}); going on with metrics.jsonl only. "
                "WANDB_MODE=offline needs no network, tracking=console no wandb"
            )


def _histogram(value: Any) -> Any:
    """A wandb.Histogram of {"low", "high", "counts"}, None where those are not finite; anything else as it is."""
    if not isinstance(value, dict):
        return value
    if not math.isfinite(value["low"] + value["high"]):
        return None
    import wandb

    counts = np.array(value["counts"])
    return wandb.Histogram(np_histogram=(counts, np.linspace(value["low"], value["high"], len(counts) + 1)))
