"""The console that commands print to, and numbers as they show them."""

import sys

from rich.console import Console

WIDTH_OF_A_FILE = 120


def number(form: str, value: float) -> str:
    """`value` formatted by `form` ("{:+.3f}"), never as a negative zero."""
    text = form.format(value)
    return form.format(0.0) if text == form.format(-0.0) else text


def console(quiet: bool = False) -> Console:
    """Standard output. A file or pipe counts as wide enough for the tables, where rich would assume 80 columns.

    Args:
        quiet: print nothing, for all processes but the main one.
    """
    return Console(quiet=quiet, width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)


def short_number(value: float | None) -> str:
    """`value` to three significant digits, thousands written out; "-" for None."""
    if value is None:
        return "-"
    if value >= 1e6:
        return f"{value:.1e}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")
