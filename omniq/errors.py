# SPDX-License-Identifier: Apache-2.0
"""Errors that the user can fix, and the one way to quote the error of a library."""

import textwrap


class UserError(Exception):
    """Something the user asked for cannot be done as asked.

    The message is one line that names the field, the value and the remedy. The command line prints it and exits with
    status 2, without a traceback. It is raised before any long work starts, unless the message says otherwise.
    """


class ErrorOnRank0(UserError):
    """Another process has met a user's mistake and prints it; this process ends as well, without a message."""


class NotByBlocks(UserError):
    """omniq cannot take a model apart into blocks; transformers may still run it whole."""


class CorruptFile(Exception):
    """A file of the run directory is truncated or altered; the message names it."""


def one_line(error: BaseException) -> str:
    """The message of an error on one line of at most 240 characters, or the name of its class if it has no message."""
    return textwrap.shorten(str(error), width=240, placeholder=" …") or type(error).__name__
