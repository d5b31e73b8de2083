"""Where people read what a command says."""

import sys

from rich.console import Console

WIDTH_OF_A_FILE = 120


def console(quiet: bool = False) -> Console:
    """Standard output; a file or a pipe is wide enough for the tables, whatever rich would guess.

    Args:
        quiet: says nothing, as on all processes but the main one.
    """
    return Console(quiet=quiet, width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)
