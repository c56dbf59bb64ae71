# SPDX-License-Identifier: Apache-2.0
"""Make standard output and standard error accept any text, independently of the terminal's encoding."""

import sys


def replace_unencodable() -> None:
    """Make both streams replace characters that they cannot encode, instead of raising an error."""
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        reconfigure = getattr(stream, "reconfigure", None)  # streams of notebooks and tests lack it
        if reconfigure is not None:
            reconfigure(errors=errors)
