"""How an exception becomes an exit code and a line on stderr."""

from __future__ import annotations

import sys
import traceback

from titans_launch import worker


def report(error: BaseException, *, composing: bool = False) -> int:
    """Say what went wrong and return the exit code.

    Errors meant for the user (those with an `exit_code`, and all of the composition) are one line;
    anything else is a bug and keeps its traceback.
    """
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        return say(code, f"titans-dist: {one_line(str(error))}")
    if isinstance(error, KeyboardInterrupt):
        return say(3, "titans-dist: interrupted")
    if composing:
        from titans_launch import explain

        if isinstance(error, explain.COMPOSITION_ERRORS):
            return say(2, f"titans-dist: {one_line(explain.sentence(error))}")
    return say(1, "".join(traceback.format_exception(error)).rstrip())


def say(code: int, text: str) -> int:
    """Bring `text` to the person who waits for this process, once per job, and return `code`."""
    # The local launcher prints what its workers report; other launchers show the stderr of every worker, where all
    # ranks but the first write to a file of their own once they know the run folder.
    if not worker.leave(code, text) and (not worker.is_worker() or worker.rank() == 0 or worker.redirected()):
        print(text, file=sys.stderr, flush=True)
    return code


def one_line(text: str) -> str:
    """`text` with all white space, line breaks too, as single blanks."""
    return " ".join(text.split())
