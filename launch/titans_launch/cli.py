"""The entry point: help and completion from static text, everything else through Hydra."""

from __future__ import annotations

import signal
import sys

from titans_launch import help


def main(arguments: list[str] | None = None) -> int:
    """Run `titans-dist ARGUMENTS` (default: the command line) and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments:
        print(help.overview(), file=sys.stderr)
        return 2
    command, arguments = help.split(arguments)
    if command in ("--help", "-h", "help"):
        print(help.overview())
        return 0
    if command == "--version":
        import titans_dist

        print(f"titans-dist {titans_dist.__version__}")
        return 0
    if command in ("-sc", "--shell-completion"):
        from titans_launch import completion

        return completion.main([command, *arguments])
    wants_help = any(argument in ("--help", "-h") for argument in arguments)
    if command in help.families() and command not in help.COMMANDS and (wants_help or not arguments):
        print(help.of_family(command), file=sys.stdout if wants_help else sys.stderr)
        return 0 if wants_help else 2
    if command not in help.COMMANDS:
        print(f"titans-dist: {help.unknown_command(command)}", file=sys.stderr)
        return 2
    if wants_help:
        print(help.of(command))
        return 0
    from titans_launch import app, worker

    if worker.is_worker():
        worker.begin()
    else:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is a Ctrl-C
    return worker.exit_code(app.run(command, arguments))
