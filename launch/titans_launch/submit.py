"""`titans-dist submit`: hand a job to Slurm, to Kubernetes or to the background of this machine."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from titans_dist.checkpoint.lease import check_free
from titans_dist.config import Config, ConfigError
from titans_dist.config.machines import SINGLE, check_processes, has_layout, processes_per_node
from titans_launch import local, names, schedulers, tables
from titans_launch.schedulers import snapshot
from titans_launch.schedulers.job import SUBMIT, Job, remember, remembered, submission


def run(config: Config, dry_run: bool = False) -> int:
    """Write what the scheduler gets and the resolved configuration to the run folder; hand it in unless `dry_run`.

    Raises UserError, before anything is handed in, for a layout that does not fill the machines, a name that runs
    already, and what the scheduler does not have.
    """
    if has_layout(config):
        check_processes(config)
    scheduler, run_dir = schedulers.named(config.cluster.backend), Path(config.run_dir)
    refuse_running(config, run_dir)
    job = described(config, run_dir)
    if not dry_run:
        scheduler.check(job)
    folder = run_dir / SUBMIT
    folder.mkdir(parents=True, exist_ok=True)
    resolved = OmegaConf.to_yaml(OmegaConf.structured(config))
    (folder / "config.yaml").write_text(resolved)
    rendered = scheduler.render(job)
    for name, text in rendered.items():
        (folder / name).write_text(text)
    if dry_run:
        for name, text in {**rendered, "config.yaml": resolved}.items():
            print(f"# {tables.place(folder / name)}\n{text}")
        return 0
    files = [folder / name for name in rendered]
    (run_dir / "logs").mkdir(exist_ok=True)  # a scheduler does not make the folder of its log
    ids = scheduler.submit(job, files)
    remember(run_dir, submission(job, ids, files))
    print(f"submitted {tables.place(run_dir)} to {config.cluster.backend} as {', '.join(ids)}")
    print(f"see titans-dist status {config.name}, titans-dist logs {config.name}")
    return 0


def described(config: Config, run_dir: Path) -> Job:
    """The job of the running Hydra job, with a copy of the source code in the run folder."""
    return Job(
        config=config,
        name=names.label(config.name),
        run_dir=run_dir.absolute(),
        folder=Path.cwd(),
        arguments=[config.submit.command, *local.job_overrides()],
        nodes=1 if config.submit.command in SINGLE else config.cluster.nodes,
        per_node=1 if config.submit.command in SINGLE else processes_per_node(config),
        code=snapshot.take(run_dir.absolute()),
    )


def refuse_running(config: Config, run_dir: Path) -> None:
    """Raise ConfigError where a job of this run waits or runs, CheckpointError where something else trains it."""
    before = remembered(run_dir)
    if before is not None:
        for state in schedulers.named(before.backend).states(before):
            if not state.is_over:
                raise ConfigError(
                    f"{config.name} is {state.state.lower()} already as {state.id} of {before.backend}; "
                    f"titans-dist cancel {config.name} ends it, and another name= is another run"
                )
    if config.submit.command == "train":
        check_free(run_dir / "checkpoints")
