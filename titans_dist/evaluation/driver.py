"""Measure a checkpoint: what is missing in the ledger, by a pool of workers."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from titans_dist.checkpoint.store import Store
from titans_dist.config import CheckpointError, Config, ConfigError
from titans_dist.evaluation.harness.tasks import is_harness, load_task
from titans_dist.evaluation.ledger import FILE, Ledger, Measured, Row
from titans_dist.evaluation.material import gather
from titans_dist.evaluation.measure import POSITIONS, windows
from titans_dist.evaluation.pool import Pool
from titans_dist.evaluation.tasks import tasks
from titans_dist.evaluation.work import Piece, pieces
from titans_dist.run.identity import check_model


def measure(config: Config, say: Callable[[str], None]) -> list[Row]:
    """Measure evaluation.tasks at evaluation.lengths; all that is known of them of this checkpoint then.

    Raises CheckpointError where there is no such checkpoint or it is damaged or of another model, ConfigError for an
    unknown task and for one that does not fit its shortest length, UserError for pieces that could not be measured.
    """
    store = Store(Path(config.run_dir) / "checkpoints")
    step = chosen(store, config.evaluation.step, say)
    measured = of_checkpoint(store, step, config)
    check_tasks(config)
    ledger = open_ledger(config)
    wanted = pieces(config.evaluation)
    known = ledger.done(measured.checkpoint)
    missing = [piece for piece in wanted if piece.key not in known]
    say(f"step {step:,}: {len(missing)} of {len(wanted)} pieces are to be measured, the others are in the ledger")
    if missing:
        with Pool(config, step) as pool:
            pool.measure(missing, lambda piece, result: ledger.add(measured, piece, result), say)
    keys = {piece.key for piece in wanted}
    return [row for row in ledger.rows([step]) if row.piece.key in keys and row.measured == measured]


def open_ledger(config: Config) -> Ledger:
    """The ledger of the run."""
    return Ledger(Path(config.run_dir) / "reports" / FILE)


def chosen(store: Store, step: int | None, say: Callable[[str], None]) -> int:
    """The step to measure, whose every file is sound. Raises CheckpointError where there is none."""
    if step is None:
        newest = store.newest_valid(say)
        if newest is None:
            raise CheckpointError(f"{store.root} has no checkpoint to measure; train the run first, with the same name")
        return newest
    store.verify(step)
    return step


def of_checkpoint(store: Store, step: int, config: Config) -> Measured:
    """What the ledger calls a checkpoint. Raises CheckpointError where it is of another model."""
    manifest = store.manifest(step)
    check_model(manifest["meta"]["identity"], config)
    memory = f" {config.model.memory.preset}" if config.model.has_memory else ""
    return Measured(
        checkpoint=store.digest(step),
        step=step,
        trained_tokens=int(manifest["meta"].get("tokens") or 0),
        model=f"{config.model.variant}{memory}",
    )


def check_tasks(config: Config) -> None:
    """Raise ConfigError for what no worker could do, before any is started."""
    settings = config.evaluation
    material, known = gather(config), tasks(settings.babi)
    samples = material.samples
    for name in settings.tasks:
        if name == POSITIONS:
            windows(Piece(name, max(settings.lengths), settings.seed, 0, 1), material.held_out_tokens)
            continue
        if not is_harness(name) and name not in known:
            near = difflib.get_close_matches(name, [POSITIONS, *known], n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose of {', '.join([POSITIONS, *known])}"
            raise ConfigError(f"evaluation.tasks has {name}, which is unknown; {hint}")
        if samples is None:
            raise ConfigError(
                f"{name} asks questions in words, and data={config.data.format} has no tokenizer; measure "
                f"{POSITIONS} alone, or use a run that was trained on text"
            )
        if is_harness(name):
            load_task(name, settings.task_folder, settings.seed)
            continue
        known[name].sample(min(settings.lengths), 0, settings.seed, samples.tokenizer, samples.text)
