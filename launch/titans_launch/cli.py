"""The entry point: help and completion from static text, everything else through Hydra."""

from __future__ import annotations

import signal
import sys

from titans_launch import help


def main(arguments: list[str] | None = None) -> int:
    """Run `titans-dist ARGUMENTS` (default: the command line) and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command = arguments[0] if arguments else None
    if command is None:
        print(help.overview(), file=sys.stderr)
        return 2
    if command in ("--help", "-h", "help"):
        print(help.overview())
        return 0
    if command == "--version":
        import titans_dist

        print(f"titans-dist {titans_dist.__version__}")
        return 0
    if command in ("-sc", "--shell-completion"):
        from titans_launch import completion

        return completion.main(arguments)
    if command not in help.COMMANDS:
        print(f"titans-dist: {help.unknown_command(command)}", file=sys.stderr)
        return 2
    if any(argument in ("--help", "-h") for argument in arguments[1:]):
        print(help.of(command))
        return 0
    from titans_launch import app, worker

    if worker.is_worker():
        worker.catch_early_stop()
    else:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is a Ctrl-C
    return app.run(command, arguments[1:])
