# SPDX-License-Identifier: Apache-2.0
"""The ``lightning`` command that omniq installs.

Lightning had a ``lightning run`` from 1.8.4 to 2.5.0, ships none since 2.5.1 (``fabric run`` is what is left of it),
and the name now belongs to whoever installs it last: omniq, or lightning-sdk, the client of Lightning's cloud. So:

    lightning run quantize|evaluate|export|report ...   omniq, in this process
    lightning run --config FILE ...                     the same as ``lightning run quantize --config FILE ...``
    lightning run [model] SCRIPT.py ...                 ``fabric run SCRIPT.py ...``, what it meant in 1.8.4 - 2.5.0
    anything else                                       the other owner of the name if there is one, as 2.3 - 2.5.0 did

The real program is ``omniq``; nothing depends on this one. Arguments are passed on as a list and ``sys.argv`` is left
alone: with several devices Lightning starts the other ranks by running ``sys.argv`` again, which must end up here.
"""

import os
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points

COMMANDS = ("quantize", "evaluate", "export", "report")

USAGE = """\
usage: lightning run quantize|evaluate|export|report ...   omniq's commands, also spelled `omniq quantize ...`
       lightning run --config FILE ...                     quantize
       lightning run [model] SCRIPT.py ...                 a Fabric script, also spelled `fabric run SCRIPT.py ...`"""


def main(args: Sequence[str] | None = None) -> int | None:
    """Send the command line to the program it means.

    Args:
        args: the command line after the program's name; ``sys.argv[1:]`` if not given.

    Returns:
        The exit status: 2 for a command line that means nothing here.
    """
    args = list(sys.argv[1:] if args is None else args)
    match args:
        case ["run", "-h" | "--help"]:
            print(USAGE)
            return 0
        case ["run", first, *_] if first in COMMANDS:
            return _omniq(args[1:])
        case ["run", "model", *rest] if rest:
            return _fabric(rest)
        case ["run", first, *_] if first.endswith(".py"):
            return _fabric(args[1:])
        case ["run", first, *_] if first.startswith("-"):
            return _omniq(["quantize", *args[1:]])
    rival = _rival()
    if rival is not None:
        return rival.load()()
    if args in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    asked = " ".join(["lightning", *args])
    print(f"`{asked}` is not a command of omniq, and no other `lightning` is installed.\n{USAGE}", file=sys.stderr)
    return 2


def other_owner() -> str | None:
    """The name of another installed distribution that claims the console script ``lightning``, if there is one.

    Then the file on PATH is that of the last install, and uninstalling either one deletes it; pip says nothing.
    """
    rival = _rival()
    return None if rival is None or rival.dist is None else rival.dist.name


@cache
def warn_if_contested() -> None:
    """Tell once, on the first rank, that another distribution claims ``lightning`` too."""
    owner = other_owner()
    if owner is not None and os.environ.get("LOCAL_RANK", "0") == "0":
        print(
            f"omniq: {owner} installs a `lightning` command too and the last install wins; "
            "`omniq quantize ...` always means omniq.",
            file=sys.stderr,
        )


def _rival() -> EntryPoint | None:
    claims = entry_points(group="console_scripts", name="lightning")
    return next((claim for claim in claims if claim.dist is not None and claim.dist.name != "omniq"), None)


def _omniq(args: list[str]) -> int | None:
    from omniq.cli import main  # late: importing torch takes seconds, and the other ways do not need it

    warn_if_contested()
    return main(args)


def _fabric(args: list[str]) -> int | None:
    from lightning.fabric import cli

    if not hasattr(cli, "_main"):  # Lightning defines it only if click is there
        print("`lightning run SCRIPT.py` needs click: pip install click", file=sys.stderr)
        return 2
    return cli._main.main(args=["run", *args], prog_name="lightning")


if __name__ == "__main__":
    sys.exit(main())
