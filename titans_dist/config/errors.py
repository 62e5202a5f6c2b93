"""Errors that are meant for the user: one sentence, no traceback, a documented exit code."""

from __future__ import annotations


class UserError(Exception):
    """A failure the user can mend; the message says what came, what is allowed and the mend."""

    exit_code = 1


class ConfigError(UserError):
    """The configuration cannot work. Schedulers must not retry it."""

    exit_code = 2


class Interrupted(UserError):
    """The run was asked to stop, saved a checkpoint and may be started again."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint is damaged or does not belong to this run."""

    exit_code = 4


class HealthError(UserError):
    """Training produced numbers that must not be trained on."""

    exit_code = 5
