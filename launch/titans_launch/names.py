"""Names that become folders, and values that become overrides."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

MAX_LENGTH = 120


OTHER_GROUPS = ("cluster", "drill", "evaluation", "experiment", "export", "inspect", "name", "submit", "suite")
"""Where a run is made and what is looked at makes no other run."""


def run_name(experiment: str, overrides: Sequence[str]) -> str:
    """The default name of a run: its experiment and what was overridden, safe as the name of a folder.

    >>> run_name("quickstart", ["training.steps=20", "parallel.tensor=1", "cluster.nodes=2"])
    'quickstart,parallel.tensor=1,training.steps=20'
    """
    own = [each for each in overrides if re.split(r"[.=@]", each.lstrip("+~"), maxsplit=1)[0] not in OTHER_GROUPS]
    wanted = ",".join([experiment, *sorted(own)])
    safe = re.sub(r"[^\w.,=+~@-]+", "_", wanted)
    if safe == wanted and len(safe) <= MAX_LENGTH:
        return safe
    # Two runs must not share a folder because their names were cut or cleaned to the same text.
    return f"{safe[:MAX_LENGTH]}-{_digest(wanted)}"


def label(name: str, longest: int = 40) -> str:
    """`name` as the name of a job or object: a DNS label of at most `longest` characters.

    >>> label("mine"), label("quickstart,parallel.tensor=1")
    ('mine', 'quickstart-parallel-tensor-1-deb7bf74')
    """
    safe = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if safe == name and len(safe) <= longest and safe[0].isalpha():
        return safe
    return f"{(safe if safe[:1].isalpha() else f'run-{safe}')[: longest - 9].strip('-')}-{_digest(name)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def quote(value: str) -> str:
    """`value` as a quoted string of Hydra's override grammar, taken literally whatever is in it."""
    # In the grammar a backslash is special only before a quote, and so at the end of the string.
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value)
    return f"'{escaped}'"


def place(run_dir: Path | str) -> str:
    """The argument that says which folder is the run's."""
    return f"hydra.run.dir={quote(str(run_dir))}"
