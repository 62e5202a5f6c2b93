"""Tab completion: Hydra completes groups, keys and values; the command before them is completed here."""

from __future__ import annotations

import os
import re

from titans_launch import help


def main(arguments: list[str]) -> int:
    """Answer `titans-dist -sc install=SHELL` and the shell's `titans-dist -sc query=SHELL`."""
    if any(argument.startswith("query=") for argument in arguments):
        line = os.environ.get("COMP_LINE", "")
        command = re.match(r"\s*\S+\s+(\S*)", line)
        typed = command[1] if command else ""
        if command is None or command.end() == len(line):
            print(" ".join(name for name in help.COMMANDS if name.startswith(typed)))
            return 0
        if typed not in help.COMMANDS:
            return 0
        # Hydra knows one command per program: it sees the line as if there were none.
        os.environ["COMP_LINE"] = line[: command.start(1)] + line[command.end() :].lstrip()
        point = int(os.environ.get("COMP_POINT", len(line)))
        os.environ["COMP_POINT"] = str(point - (len(line) - len(os.environ["COMP_LINE"])))
    from titans_launch import app

    app.register()
    app.start(lambda config: None, arguments)
    return 0
