# SPDX-License-Identifier: Apache-2.0
"""The ``lightning`` command that omniq installs.

Lightning shipped ``lightning run`` from 1.8.4 to 2.5.0. Since 2.5.1 only ``fabric run`` remains. ``lightning-sdk``, the
client of Lightning's cloud, also installs a ``lightning`` command; the package that is installed last owns the name.
omniq's command therefore forwards anything that it does not recognize:

    lightning run quantize|evaluate|export|verify|report ...   omniq, in this process
    lightning run --config FILE ...                     the same as ``lightning run quantize --config FILE ...``
    lightning run [model] SCRIPT.py ...                 ``fabric run SCRIPT.py ...``, as in 1.8.4 - 2.5.0
    anything else                                       the other installed ``lightning`` command, as in 2.3 - 2.5.0

The main program is ``omniq``; it does not depend on this command. Arguments are forwarded as a list and ``sys.argv``
stays as it is: with several devices, Lightning starts the other ranks by running ``sys.argv`` again, and that command
line must reach this function again.
"""

import os
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points

COMMANDS = ("quantize", "evaluate", "export", "verify", "report")

USAGE = """\
usage: lightning run quantize|evaluate|export|verify|report ...   omniq's commands, also spelled `omniq quantize ...`
       lightning run --config FILE ...                     quantize
       lightning run [model] SCRIPT.py ...                 a Fabric script, also spelled `fabric run SCRIPT.py ...`"""


def main(args: Sequence[str] | None = None) -> int | None:
    """Forward the command line to the program that it addresses.

    Args:
        args: the arguments after the program's name. The default is ``sys.argv[1:]``.

    Returns:
        The exit status; 2 if no program accepts the command line.
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
    other = _other_entry_point()
    if other is not None:
        return other.load()()
    if args in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    command = " ".join(["lightning", *args])
    print(f"`{command}` is not a command of omniq, and no other `lightning` is installed.\n{USAGE}", file=sys.stderr)
    return 2


def other_owner() -> str | None:
    """Return the name of another installed distribution that provides the console script ``lightning``, or None.

    In that case the file on PATH belongs to the last install, and uninstalling either distribution deletes it without
    a warning from pip.
    """
    other = _other_entry_point()
    return None if other is None or other.dist is None else other.dist.name


@cache
def warn_if_contested() -> None:
    """Warn once, on rank 0, that another distribution also provides ``lightning``."""
    owner = other_owner()
    if owner is not None and os.environ.get("LOCAL_RANK", "0") == "0":
        print(
            f"omniq: {owner} also installs a `lightning` command and the last install wins; "
            "`omniq quantize ...` always means omniq.",
            file=sys.stderr,
        )


def _other_entry_point() -> EntryPoint | None:
    claims = entry_points(group="console_scripts", name="lightning")
    return next((claim for claim in claims if claim.dist is not None and claim.dist.name != "omniq"), None)


def _omniq(args: list[str]) -> int | None:
    from omniq.cli import main  # imported late: it is slow, and the other programs do not need it

    warn_if_contested()
    return main(args)


def _fabric(args: list[str]) -> int | None:
    from lightning.fabric import cli

    if not hasattr(cli, "_main"):  # Lightning defines it only if click is installed
        print("`lightning run SCRIPT.py` needs click: pip install click", file=sys.stderr)
        return 2
    return cli._main.main(args=["run", *args], prog_name="lightning")


if __name__ == "__main__":
    sys.exit(main())
