# SPDX-License-Identifier: Apache-2.0
"""Run the ``omniq`` command as ``python -m omniq``."""

import sys

from omniq.cli.command import main

if __name__ == "__main__":
    sys.argv[0] = "omniq"  # the help of a class takes the program's name from here
    sys.exit(main())
