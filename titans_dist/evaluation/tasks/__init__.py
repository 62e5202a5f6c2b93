"""Benchmark tasks: their questions, made for a length, and how answers are scored. No model, no torch.

    name                        what is asked
    niah_single_1, _2, _3       RULER: a number in noise, a number in essays, a uuid in essays
    niah_multikey_1, _2, _3     RULER: one of four keys, of thousands, of thousands of uuids
    niah_multivalue             RULER: the four values of one key
    niah_multiquery             RULER: the values of four keys
    passkey                     the number that was said among the same sentences again and again
    mqar                        which word stood beside this one
    babilong_qa1 to _qa5        what follows from facts of bAbI that lie among other sentences
    babi_like_qa1 to _qa5       the same of generated stories, which needs no download

Each of the last ten has a form `_finetuned` for models that were trained on the task.
"""

from __future__ import annotations

from pathlib import Path

from titans_dist.evaluation.tasks.babilong import hidden_facts
from titans_dist.evaluation.tasks.needles import NEEDLE_TASKS
from titans_dist.evaluation.tasks.passkey import Passkey
from titans_dist.evaluation.tasks.recall import Recall
from titans_dist.evaluation.tasks.sample import Sample, Task, TaskDoesNotFit, digest
from titans_dist.evaluation.tasks.strings import About, about
from titans_dist.evaluation.tasks.text import Text, load_text

__all__ = ["About", "Sample", "Task", "TaskDoesNotFit", "Text", "about", "digest", "load_text", "tasks"]


def tasks(babi: str | Path | None = None) -> dict[str, Task]:
    """All tasks by name; `babi` is the folder en-10k of bAbI, without which those of BABILong raise ConfigError."""
    found: list[Task] = [*NEEDLE_TASKS, Passkey(), Recall(), *hidden_facts(babi)]
    return {task.name: task for task in found}
