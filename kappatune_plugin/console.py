"""Where people read what a command says."""

import sys

from rich.console import Console

WIDTH_OF_A_FILE = 120


def number(form: str, value: float) -> str:
    """`value` in `form` ("{:+.3f}"), without the minus of a zero that only rounding made."""
    text = form.format(value)
    return form.format(0.0) if text == form.format(-0.0) else text


def console(quiet: bool = False) -> Console:
    """Standard output; a file or a pipe is wide enough for the tables, whatever rich would guess.

    Args:
        quiet: says nothing, as on all processes but the main one.
    """
    return Console(quiet=quiet, width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)


def short_number(value: float | None) -> str:
    """Three significant digits, thousands written out, "-" for None."""
    if value is None:
        return "-"
    if value >= 1e6:
        return f"{value:.1e}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")
