"""Tab completion: Hydra completes groups, keys and values; the command before them, of one word or two, its flags and
the names of submitted runs are completed here."""

from __future__ import annotations

import os
import re
from pathlib import Path

from titans_launch import flags, help


def main(arguments: list[str]) -> int:
    """Answer `titans-dist -sc install=SHELL` and the shell's `titans-dist -sc query=SHELL`."""
    if any(argument.startswith("query=") for argument in arguments):
        line = os.environ.get("COMP_LINE", "")
        command = re.match(r"\s*\S+\s+(\S*)", line)
        if command and command[1] in help.families() and command.end() < len(line):
            two = re.match(r"\s*\S+\s+(\S+\s+\S*)", line)
            begun = re.sub(r"\s+", " ", two[1]) if two else ""
            # `evaluate` is a command by itself too: what follows it may be a key.
            if command[1] not in help.COMMANDS or any(name.startswith(begun) for name in help.COMMANDS):
                command = two
        typed = re.sub(r"\s+", " ", command[1]) if command else ""
        if command is None or command.end() == len(line):
            place = typed.count(" ")
            found = (name.split()[place] for name in help.COMMANDS if name.startswith(typed))
            print(" ".join(dict.fromkeys(found)))
            return 0
        if typed not in help.COMMANDS:
            return 0
        words = line[command.end() :].split()
        word = "" if line[-1].isspace() else words.pop()
        options = [flag for flag in flags.of(typed) if flag.startswith(word)] if word.startswith("-") else []
        try:
            keys, _ = flags.translate(typed, words)
        except ValueError:  # what is typed is the value of a flag
            return 0
        if typed in flags.NAMED and "=" not in word and not options:
            there = (path.parents[1].name for path in Path("runs").glob("*/submit/submission.json"))
            options = sorted(name for name in there if name.startswith(word))
        if options:
            print(" ".join(options))
            return 0
        # Hydra knows one command per program, and none of its flags: it sees the line as if there were neither.
        os.environ["COMP_LINE"] = " ".join([line.split()[0], *keys, word])
        os.environ["COMP_POINT"] = str(len(os.environ["COMP_LINE"]))
    from titans_launch import app

    app.register()
    app.start(lambda config: None, arguments)
    return 0
