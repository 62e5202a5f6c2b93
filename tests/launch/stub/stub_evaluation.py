"""An evaluation without a model."""

from __future__ import annotations

import json
from pathlib import Path


def evaluate(config):
    run_dir = Path(config.run_dir)
    newest = max((run_dir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    result = {
        "loss": 2.5,
        "bits_per_byte": 1.25,
        "perplexity": 12.18,
        "tokens": 1000,
        "bytes": 3000,
        "sequences": 4,
        "step": int(newest.name),
        "seconds": 0.5,
        "checkpoint": str(newest),
    }
    (run_dir / "reports").mkdir(exist_ok=True)
    (run_dir / "reports" / "heldout.json").write_text(json.dumps(result))
    return result
