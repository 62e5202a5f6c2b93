"""`titans-dist resume`: `train` for a run that has a checkpoint; with --explain, what that start would do."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from titans_dist.checkpoint.lease import check_free
from titans_dist.checkpoint.store import Store
from titans_dist.config import CheckpointError, Config, ConfigError
from titans_dist.config.layout import describe_layout, model_size
from titans_launch import prepare, tables, train, worker
from titans_launch.checkpoint.ls import processes, saved
from titans_launch.data import plan

if TYPE_CHECKING:
    from titans_dist.run.data import TrainingData
    from titans_dist.run.explain import Difference


def run(config: Config, explain: bool = False) -> int:
    """Train from the newest checkpoint, or say what that would be. Raises CheckpointError where there is none."""
    if explain:
        explained(config)
        return 0
    # Read whole, so that damage is found before the start that would begin anew; once, not by every worker.
    if not worker.is_worker() or worker.rank() == 0:
        passed_over: list[str] = []
        if newest(config, passed_over) is None and in_mirror(config) is None:
            raise nothing(config, passed_over)
    return train.run(config)


def newest(config: Config, passed_over: list[str]) -> int | None:
    """The step that a start would go on from; `passed_over` gets a sentence for everything it would not use."""
    return Store(Path(config.run_dir) / "checkpoints").newest_valid(passed_over.append)


def in_mirror(config: Config) -> dict[str, Any] | None:
    """The manifest of the checkpoint that a start would fetch, where the run folder has none."""
    if config.checkpoint.mirror is None:
        return None
    from titans_dist.checkpoint import mirror

    return mirror.newest(config.checkpoint.mirror)


def nothing(config: Config, passed_over: list[str]) -> CheckpointError:
    """What to raise where there is no checkpoint."""
    why = f" ({passed_over[0]})" if passed_over else ""
    return CheckpointError(
        f"{tables.place(config.run_dir)} has no checkpoint to go on from{why}; give the name=NAME and the overrides "
        "the run was started with, or start it with titans-dist train"
    )


def explained(config: Config) -> None:
    """Print the checkpoint, what differs, and what the first step reads. Raises what the start would raise."""
    with warnings.catch_warnings(action="ignore"):  # megatron-core's, of what it misses
        from titans_dist.checkpoint.sharded import check_space
    from titans_dist.parallel.peers import own_versions
    from titans_dist.run.data import left_out
    from titans_dist.run.explain import explain

    copies = config.parallel.data or config.inspect.ranks or 1
    layout = f"{model_size(config.parallel) * copies} = {describe_layout(config.parallel, copies)}"
    passed_over: list[str] = []
    step = newest(config, passed_over)
    for sentence in passed_over:
        print(sentence)
    store = Store(Path(config.run_dir) / "checkpoints")
    manifest = in_mirror(config) if step is None else store.manifest(step)
    if manifest is None:
        raise nothing(config, passed_over)
    where = tables.place(store.folder(manifest["step"]))
    if step is None:
        where += f", fetched from {config.checkpoint.mirror}"
    step, meta = manifest["step"], manifest["meta"]
    tables.show(
        "checkpoint",
        [
            ("would be used", where),
            ("step", f"{step:,} of {config.training.steps:,}"),
            *([("saved", saved(meta["time"]))] if meta.get("time") else []),
            *([("saved by", processes(meta["job"]))] if meta.get("job") else []),
            ("to be started", layout),
        ],
    )
    if config.data.format not in prepare.READY_MADE:
        if not Path(config.data.path).exists():
            raise CheckpointError(
                f"a start would prepare {config.data.path} first, and whether that is the dataset the run has read "
                "cannot be said before; run titans-dist prepare with these overrides, then ask again"
            )
        prepare.ensure(config.data)  # what is there is taken or refused
    explanation = explain(meta, config, copies, own_versions(), step)
    show_differences(explanation.differences)
    if not isinstance(explanation.refusal, ConfigError):
        check_free(store.root)  # a start looks at this first, but for its own configuration
    if explanation.refusal is not None:
        raise explanation.refusal
    if step >= config.training.steps:
        print(f"the run is done: {step:,} of {config.training.steps:,} steps; nothing would be trained")
        return
    assert explanation.data is not None
    size_bytes = sum(entry["size"] for entry in manifest["files"].values())
    if warning := check_space(store, size_bytes, config.checkpoint.keep):
        print(warning)
    show_samples(explanation.data, step, left_out(meta.get("health"), step + 1), copies)
    print(f"a start would go on with step {step + 1:,} on {layout}")


def show_differences(differences: list[Difference]) -> None:
    """Print what is not as it was."""
    if not differences:
        print("nothing differs from when it was saved")
        return
    table = Table(title="what differs", title_justify="left")
    for name in ("", "saved", "now", "what that means"):
        table.add_column(name, overflow="fold")
    for each in differences:
        table.add_row(each.what, each.saved, each.now, each.verdict)
    tables.console().print(table)


def show_samples(data: TrainingData, step: int, passed_over: int, ranks: int) -> None:
    """Print what each data-parallel rank reads in the first step after `step`."""
    from titans_data.samples import samples

    if passed_over:
        was = step + passed_over + 1
        print(f"the data of {passed_over:,} steps was left out, so it is what step {was:,} was to read")
    length, share = data.rows.sequence_length, data.schedule.global_batch // ranks
    shown = max(1, plan.SHOWN // ranks)  # of each rank
    rows: list[tuple[int | str, ...]] = [
        (step + 1, x.slot, x.rank, data.sources[x.source].name, x.epoch + 1, x.row, x.row * length)
        for x in samples(data.schedule, data.sources, step + passed_over, ranks)
        if x.slot % share < shown
    ]
    plan.show(rows, len(rows))
    if share > shown:
        print(f"and {share - shown:,} more of each rank: titans-dist data plan inspect.step={step + 1} tells")
