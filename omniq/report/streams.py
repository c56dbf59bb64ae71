# SPDX-License-Identifier: Apache-2.0
"""Standard output and error that take any text, whatever the terminal can encode."""

import sys


def replace_unencodable() -> None:
    """Make both streams replace characters that they cannot encode, instead of raising an error."""
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        reconfigure = getattr(stream, "reconfigure", None)  # a stream that a notebook or test has put there has none
        if reconfigure is not None:
            reconfigure(errors=errors)
