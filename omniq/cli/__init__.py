# SPDX-License-Identifier: Apache-2.0
"""What people type: ``omniq quantize | evaluate | export | report`` and ``lightning run``.

Commands, exit status, one-line errors. May import every other room. Read ``command.py`` first.
"""

from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line (``omniq.cli.command.main``)."""
    from omniq.cli import command

    return command.main(args)
