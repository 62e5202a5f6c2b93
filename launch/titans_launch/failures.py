"""How an exception becomes an exit code and a line on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback

from titans_launch import attempts, postmortem, worker


def report(error: BaseException, *, composing: bool = False) -> int:
    """Say what went wrong and return the exit code.

    Errors meant for the user (those with an `exit_code`, and all of the composition) are one line;
    anything else is a bug and keeps its traceback.
    """
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        return say(code, f"titans-dist: {one_line(str(error))}", is_final=code in attempts.FINAL)
    if isinstance(error, KeyboardInterrupt):
        return say(3, "titans-dist: interrupted")
    if isinstance(error, BrokenPipeError) and _nobody_reads():
        return 1
    if composing:
        from titans_launch import explain

        if isinstance(error, explain.COMPOSITION_ERRORS):
            return say(2, f"titans-dist: {one_line(explain.sentence(error))}", is_final=True)
    with contextlib.suppress(OSError):  # a full disk must not hide the error itself
        worker.write_stacks(error)
    return say(1, "".join(traceback.format_exception(error)).rstrip())


def _nobody_reads() -> bool:
    """Whether standard output leads nowhere any more, as behind `| head`; what is still printed then goes nowhere."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def say(code: int, text: str, *, is_final: bool = False) -> int:
    """Bring `text` to the person who waits for this process, once per job, and return `code`.

    `is_final` says that starting the processes again would end the same way.
    """
    # The local launcher prints what its workers report; other launchers show the stderr of every worker, where all
    # ranks but the first write to a file of their own once they know the run folder.
    if not worker.leave(code, text, is_final=is_final):
        if not worker.is_worker() or worker.rank() == 0 or worker.redirected():
            print(text, file=sys.stderr, flush=True)
        postmortem.add_own(code, text, is_final)
    return code


def one_line(text: str) -> str:
    """`text` with all white space, line breaks too, as single blanks."""
    return " ".join(text.split())
