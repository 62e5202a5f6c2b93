"""The stories of bAbI, from the files of the user.

Weston et al. 2015, "Towards AI-Complete Question Answering: A Set of Prerequisite Toy Tasks", arXiv 1502.05698. A line
is a number, which begins again at 1 with every story, and a fact; or a number, a question, a tab, the answer, a tab
and the numbers of the facts that it rests on.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from titans_dist.config import ConfigError
from titans_dist.evaluation.tasks.stories import Story

ARCHIVE = "data/tasks_1-20_v1-2.zip of https://github.com/booydar/babilong"


@cache
def babi_stories(folder: str | None, task: str, split: str) -> tuple[Story, ...]:
    """Each question of the file of qa1 to qa5 in the folder, with the facts before it; split is train or test.

    Raises ConfigError where the folder or the file is missing, or is no such file.
    """
    if folder is None:
        raise ConfigError(
            f"babilong_{task} needs the bAbI tasks; download and unpack {ARCHIVE} and set evaluation.babi to its "
            f"folder en-10k, or take babi_like_{task}, whose stories are generated"
        )
    path = Path(folder).expanduser()
    files = sorted(path.glob(f"{task}_*_{split}.txt"))
    if len(files) != 1:
        raise ConfigError(
            f"evaluation.babi={folder} has {len(files)} files {task}_*_{split}.txt and must have one; download "
            f"and unpack {ARCHIVE} and give its folder en-10k"
        )
    try:
        found = tuple(_read(files[0].read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{files[0]} is no file of bAbI ({error}); unpack {ARCHIVE} again") from None
    if not found:
        raise ConfigError(f"{files[0]} has no questions; unpack {ARCHIVE} again")
    return found


def _read(content: str) -> list[Story]:
    stories: list[Story] = []
    facts: list[str] = []
    place: dict[int, int] = {}  # number of the line: which fact it is
    for line in content.splitlines():
        if not line.strip():
            continue
        number, _, rest = line.strip().partition(" ")
        if int(number) == 1:
            facts, place = [], {}
        question, *more = rest.split("\t")
        if more:
            answer, support = more
            on = tuple(sorted(place[int(each)] for each in support.split()))
            stories.append(Story(tuple(facts), question.strip(), answer.strip(), on))
        else:
            place[int(number)] = len(facts)
            facts.append(rest.strip())
    return stories
