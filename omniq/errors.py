# SPDX-License-Identifier: Apache-2.0
"""Errors that the user can fix, and a function that quotes the error of a library in one line."""

import textwrap


class UserError(Exception):
    """The user's request is not possible.

    The message is one line that names the field, the value and the remedy. The command line prints it and exits with
    status 2, without a traceback. It is raised before any long work starts, unless the message says otherwise.
    """


class ErrorOnRank0(UserError):
    """Rank 0 met an error that the user can fix and prints it. This process also stops, without a message."""


class NotByBlocks(UserError):
    """omniq cannot split a model into blocks. transformers may still run the whole model."""


class CorruptFile(Exception):
    """A file of the run directory is truncated or altered. The message names the file."""


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line of at most 240 characters; its class name if the message is empty."""
    return textwrap.shorten(str(error), width=240, placeholder=" …") or type(error).__name__
