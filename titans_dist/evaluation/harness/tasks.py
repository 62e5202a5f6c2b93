"""A task of lm-evaluation-harness by its name, ready to be asked."""

from __future__ import annotations

import difflib
import functools
import logging
from pathlib import Path
from typing import Any

from titans_dist.config import ConfigError, UserError
from titans_dist.config.evaluation import HARNESS


def is_harness(task: str) -> bool:
    """Whether a task of a suite is one of the harness."""
    return task.startswith(HARNESS)


def load_task(task: str, folder: str | None, seed: int) -> Any:
    """The harness's task lm/NAME with its documents; `folder` holds task files, which come before the harness's own.

    Examples in a prompt, where the task has them, are drawn with `seed`. Raises ConfigError for a task that is not
    there or cannot be asked, UserError where the harness is not installed or the documents are not within reach.
    """
    try:
        import lm_eval.api.metrics
        import lm_eval.tasks  # noqa: F401
    except ImportError:
        raise UserError(f"{task} needs lm-evaluation-harness; install titans-dist[harness]") from None
    name, entry = task.removeprefix(HARNESS), _entry(task, folder)
    found = _with_documents(task, entry)
    for mark, what in (("UNSAFE_CODE", "runs code that the model has written"), ("MULTIMODAL", "shows pictures")):
        if getattr(found, mark, False):
            raise ConfigError(f"{task} {what}, which is not done here; leave it out")
    if score_name(name, found) is None and found.OUTPUT_TYPE != "loglikelihood_rolling":
        raise ConfigError(
            f"{task} is scored by {', '.join(found.aggregation())}, which no single document has; choose a task with "
            "an accuracy, or one of whole texts"
        )
    if found.get_config("num_fewshot") is None:
        found.set_config("num_fewshot", 0)
    found.set_fewshot_seed(seed)
    return found


BY_LENGTH = ("hellaswag", "arc_challenge")
"""Tasks whose headline in the papers is the accuracy by log-likelihood per character."""


def score_name(name: str, task: Any) -> str | None:
    """The metric that scores each document from 0 to 1 and is reported first; None where the task measures losses."""
    from lm_eval.api.metrics import mean

    shares = [metric for metric, aggregate in task.aggregation().items() if aggregate is mean]
    wanted = "acc_norm" if name in BY_LENGTH else "acc"
    return wanted if wanted in shares else next(iter(shares), None)


def _entry(task: str, folder: str | None) -> tuple[Any, Any]:
    """The index that has the task, and what it says of it."""
    name = task.removeprefix(HARNESS)
    own = _index(folder) if folder else None
    index = own if own is not None and name in own.task_index else _index(None)
    if name in index.all_subtasks:
        return index, index.task_index[name]
    if name in index.task_index:
        members = ", ".join(HARNESS + member for member in sorted(_members(index, name))[:20])
        raise ConfigError(f"{task} is a group of tasks; name those that are meant, such as {members or 'its members'}")
    known = [*(own.all_subtasks if own else []), *index.all_subtasks]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {HARNESS}{near[0]}?" if near else "`lm-eval ls tasks` lists what it has"
    where = f" or evaluation.task_folder={folder}" if folder else ""
    raise ConfigError(f"evaluation.tasks has {task}, which is no task of lm-evaluation-harness{where}; {hint}")


def _members(index: Any, name: str) -> list[str]:
    entry = index.task_index[name]
    listed = (entry.cfg or {}).get("task")
    named = [each if isinstance(each, str) else each.get("task") for each in listed] if isinstance(listed, list) else []
    return [member for member in (*entry.tags, *named) if member and member != name]


@functools.cache
def _index(folder: str | None) -> Any:
    """The task files of a folder; of the harness itself, which has so many that reading them takes seconds."""
    from lm_eval.tasks import TaskManager

    if folder is None:
        return TaskManager()
    if not Path(folder).expanduser().is_dir():
        raise ConfigError(
            f"evaluation.task_folder={folder} is no folder; give one with task files (.yaml), or leave it"
        )
    return TaskManager(include_path=str(Path(folder).expanduser()), include_defaults=False)


def _with_documents(task: str, found: tuple[Any, Any]) -> Any:
    index, entry = found
    for library in ("lm_eval", "huggingface_hub"):  # whose warnings would hide the one sentence
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        loaded = index.load(entry.name)["tasks"][entry.name]
        documents = len(loaded.eval_docs)
    except (ConnectionError, FileNotFoundError) as error:
        dataset = (entry.cfg or {}).get("dataset_path")
        raise UserError(
            f"{task} needs the dataset {dataset}, which is neither in the cache of Hugging Face (HF_HOME) nor within "
            f"reach ({_line(error)}); without a network, load it once elsewhere and bring that cache, or point a task "
            "file in evaluation.task_folder at local files"
        ) from None
    except Exception as error:  # task files run code of their own
        raise ConfigError(
            f"{task} cannot be loaded from {entry.yaml_path} ({type(error).__name__}: {_line(error)}); mend that file "
            "or leave the task out"
        ) from None
    if documents == 0:
        raise ConfigError(f"{task} has no documents; look at the files that {entry.yaml_path} names")
    return loaded


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
