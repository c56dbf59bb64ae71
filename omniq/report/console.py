# SPDX-License-Identifier: Apache-2.0
"""The console of omniq. It prints text of users, models and libraries literally.

By default, rich interprets ``[/INST]`` in a prompt, or brackets in a name, as markup.
"""

from rich.console import Console

from omniq.report.streams import replace_unencodable


def plain_console(quiet: bool = False) -> Console:
    """Make a console without markup and emoji codes. It replaces characters that the stream cannot encode.

    Args:
        quiet: discard all output.
    """
    replace_unencodable()
    return Console(quiet=quiet, markup=False, emoji=False)
