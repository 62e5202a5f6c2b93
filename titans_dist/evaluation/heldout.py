"""Loss, perplexity and bits per byte on the held-out text, every sequence read once."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from titans_data import evaluation_batches, stream_evaluation_batches
from titans_dist.checkpoint.sharded import load, newest_valid
from titans_dist.checkpoint.store import Store
from titans_dist.config import CheckpointError, Config, Interrupted
from titans_dist.parallel.peers import mark
from titans_dist.parallel.processes import processes
from titans_dist.parallel.requests import Requests
from titans_dist.parallel.scorer import Scorer
from titans_dist.run.data import open_rows
from titans_dist.run.identity import check_model


def evaluate(config: Config) -> dict[str, Any]:
    """Score the run's newest valid checkpoint, on every process of the job; rank 0 writes reports/heldout.json.

    Losses are in nats per token. Bits per byte count the bytes of the text itself: end-of-document tokens are
    predicted, and paid for, but have no bytes. The model sees what it saw in training: sequences for themselves, or
    with training.carry_state every sequence after all of its document that came before it. Raises CheckpointError
    where the run has no checkpoint, Interrupted after a signal, a STOP file or a deadline.
    """
    started = time.perf_counter()
    requests = Requests(Path(config.run_dir), config.training.max_minutes, os.environ["RANK"] == "0")

    def poll() -> None:
        mark("evaluation")
        asked, _ = requests.asked(0)
        if asked.stop:
            requests.obeyed(asked)
            raise Interrupted(f"stopped by {asked.stop} before the evaluation was over; start it again")

    with processes(config) as device:
        store = Store(Path(config.run_dir) / "checkpoints")
        step = newest_valid(store, print)
        if step is None:
            raise CheckpointError(f"{config.run_dir} has no checkpoint; train it first with the same name")
        check_model(store.meta(step)["identity"], config)
        rows = open_rows(config, "validation")
        scorer = Scorer(config, device)
        scorer.load(load(store, step, scorer.sharded_state(), partial=True))
        settings = config.evaluation
        read = stream_evaluation_batches if config.training.carry_state else evaluation_batches
        batches = read(rows, scorer.data_rank, scorer.data_size, settings.micro_batch_size, settings.max_sequences)
        loss, tokens = scorer.total_loss(batches, poll)
        per_token, bytes_per_token = loss / tokens, rows.bytes_per_token
        report = {
            "loss": per_token,
            "perplexity": math.exp(min(per_token, 700)),
            "bits_per_byte": None if bytes_per_token is None else per_token / bytes_per_token / math.log(2),
            "tokens": tokens,
            "bytes": None if bytes_per_token is None else round(tokens * bytes_per_token),
            "sequences": tokens // config.data.sequence_length,
            "documents": config.data.documents,
            "carry_state": config.training.carry_state,
            "step": step,
            "checkpoint": str(store.folder(step)),
            "seconds": time.perf_counter() - started,
        }
        if dist.get_rank() == 0:
            folder = Path(config.run_dir) / "reports"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "heldout.json").write_text(json.dumps(report, indent=2) + "\n")
        return report
