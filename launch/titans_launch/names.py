"""Names that become folders, and values that become overrides."""

from __future__ import annotations

import hashlib
import re

MAX_LENGTH = 120


def run_name(experiment: str, override_dirname: str) -> str:
    """The default name of a run: its experiment and what was overridden, safe as the name of a folder.

    >>> run_name("quickstart", "parallel.tensor=1,training.steps=20")
    'quickstart,parallel.tensor=1,training.steps=20'
    """
    wanted = f"{experiment},{override_dirname}" if override_dirname else str(experiment)
    safe = re.sub(r"[^\w.,=+~@-]+", "_", wanted)
    if safe == wanted and len(safe) <= MAX_LENGTH:
        return safe
    # Two runs must not share a folder because their names were cut or cleaned to the same text.
    digest = hashlib.sha256(wanted.encode()).hexdigest()[:8]
    return f"{safe[:MAX_LENGTH]}-{digest}"


def quote(value: str) -> str:
    """`value` as a quoted string of Hydra's override grammar, taken literally whatever is in it."""
    # In the grammar a backslash is special only before a quote, and so at the end of the string.
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value)
    return f"'{escaped}'"
