# SPDX-License-Identifier: Apache-2.0
"""The console that omniq prints to: text of users, models and libraries appears as it is.

rich would read ``[/INST]`` in a prompt, or brackets in a name, as markup.
"""

from rich.console import Console

from omniq.report.streams import replace_unencodable


def plain_console(quiet: bool = False) -> Console:
    """A console without markup and emoji codes; characters that the stream cannot encode are replaced.

    Args:
        quiet: print nothing.
    """
    replace_unencodable()
    return Console(quiet=quiet, markup=False, emoji=False)
