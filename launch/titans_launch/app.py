"""One command as a Hydra application over the typed configuration."""

from __future__ import annotations

import contextlib
import importlib
import keyword
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from titans_dist.config import Config, ConfigError, validate
from titans_launch import failures, flags, keys, names, worker


def run(command: str, arguments: list[str]) -> int:
    """Compose the configuration of `arguments`, run `command` on it (once per job of a sweep), return the exit code."""
    # Hydra then hands its exceptions on instead of printing them and exiting with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    register()
    try:
        arguments, switches = flags.translate(command, arguments)
        _check_flags(arguments)
        start(_task(command, switches), arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except (Exception, KeyboardInterrupt) as error:
        return failures.report(error, composing=True)
    return 0


def register() -> None:
    """Make the schema and the resolvers of config.yaml known to Hydra."""
    ConfigStore.instance().store("schema", Config)
    OmegaConf.register_new_resolver("run_name", names.run_name, replace=True)
    OmegaConf.register_new_resolver("run_dir", _run_dir, replace=True)


def start(task: Callable[[DictConfig], None], arguments: list[str]) -> None:
    """Hand `arguments` to Hydra, as if they were the command line of `titans-dist`."""
    sweep_file = Path("runs", "multirun.yaml")
    had_sweep_file = sweep_file.exists()
    command_line, sys.argv = sys.argv, ["titans-dist", *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(keys.CONFIGS), config_name="config")(task)()
    finally:
        sys.argv = command_line
        if not had_sweep_file:
            sweep_file.unlink(missing_ok=True)  # Hydra's copy of the sweep; each run has its own config.yaml
            remove_empty(sweep_file.parent)


def typed(config: DictConfig) -> Config:
    """The composed configuration as validated dataclasses."""
    strays = keys.strays(OmegaConf.to_container(config))  # type: ignore[arg-type]
    if strays:
        raise ConfigError(keys.unknown(strays[0]))
    result = OmegaConf.to_object(config)
    assert isinstance(result, Config)
    validate(result)
    return result


def remove_empty(folder: Path) -> None:
    """Remove `folder` if there is nothing in it."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def _task(command: str, switches: dict[str, bool]) -> Callable[[DictConfig], None]:
    def task(composed: DictConfig) -> None:
        run_dir = Path(composed.run_dir)
        try:
            code = _run(command, composed, switches)
        finally:
            remove_empty(run_dir)  # Hydra makes it before the task, needed or not
            remove_empty(run_dir.parent)
        if code:
            raise SystemExit(code)

    return task


def _run(command: str, composed: DictConfig, switches: dict[str, bool]) -> int:
    try:
        config = typed(composed)
    except Exception as error:
        return failures.report(error, composing=True)
    try:
        worker.adopt_slurm()
        words = command.replace("-", "_").split()
        # `checkpoint import` is titans_launch.checkpoint.import_: no module can have a keyword's name.
        module = ".".join(f"{word}_" if keyword.iskeyword(word) else word for word in words)
        code = importlib.import_module(f"titans_launch.{module}").run(config, **switches)
    except (Exception, KeyboardInterrupt) as error:
        return failures.report(error)
    worker.leave(code or 0, "")
    return code or 0


def _run_dir(output_dir: str | None, wanted: str) -> str:
    # Hydra fills in the output folder when a job starts; --cfg starts none.
    return output_dir or str(Path(wanted).absolute())


def _check_flags(arguments: list[str]) -> None:
    parser = get_args_parser()

    def error(message: str) -> NoReturn:
        raise ConfigError(f"{message}; titans-dist COMMAND --help shows examples, --hydra-help every flag")

    parser.error = error  # type: ignore[method-assign]
    parser.parse_args(arguments)
