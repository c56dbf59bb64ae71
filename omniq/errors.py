# SPDX-License-Identifier: Apache-2.0
"""What is the user's to mend."""


class UserError(Exception):
    """Something the user asked for cannot be done as asked.

    The message is one line that names the field, the value and the remedy. The command line prints it and exits with
    status 2, without a traceback; nothing long-running has started by then unless the message says so.
    """


class ErrorOnRank0(UserError):
    """Another process has met a user's mistake and prints it; this process ends as well, without a message."""


class NotByBlocks(UserError):
    """omniq cannot take a model apart into blocks; transformers may still run it whole."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class CorruptFile(Exception):
    """A file of the run directory is truncated or altered; the message names it."""
