# SPDX-License-Identifier: Apache-2.0
"""The command line: ``omniq quantize | evaluate | export | report`` and ``lightning run``.

This room holds the commands, their exit statuses and their one-line errors. May import every other room. Read
``command.py`` first.
"""

from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line (``omniq.cli.command.main``)."""
    from omniq.cli import command

    return command.main(args)
