"""The one exception that data users meet."""

from __future__ import annotations


class DataError(Exception):
    """Something about the data cannot work; the message is one sentence: what came, what is allowed, the mend."""

    exit_code = 4
