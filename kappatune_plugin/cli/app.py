"""What the commands of `kappatune` share."""

import functools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.selection.criteria import rank_help
from kappatune_plugin.version import __version__

app = typer.Typer(
    help="Fine-tune only the weight matrices of lowest condition number, and see what was forgotten.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # --rank-by is --rank_by, of every option
    context_settings={"token_normalize_func": lambda word: word.replace("-", "_")},
)
K_HELP = "How much to train: 75 (matrices), 10%, '{params: 160M}' or '{kappa: 30}'."
RankBy = Annotated[str, typer.Option("--rank_by", help=rank_help())]
# of a command that hands on what it doesn't know
TAKES_MORE = {"allow_extra_args": True, "ignore_unknown_options": True}
TrustRemoteCode = Annotated[bool, typer.Option("--trust_remote_code", help="Run code that comes with the model.")]


def at_home(path: Any) -> Any:
    """`path` with its ~ resolved: a shell leaves that of `--output=~/x` alone."""
    return type(path)(os.path.expanduser(path)) if isinstance(path, str | Path) else path


# what the system says of a path that can't be, wherever it is first used
NO_PATH = re.compile("File name too long|embedded null (byte|character)|Symlink loop|Too many levels of symbolic links")


def clean_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Print a KappaTuneError as one message and exit with 2: the user's mistake needs no traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*map(at_home, args), **{name: at_home(value) for name, value in kwargs.items()})
        except (KappaTuneError, OSError, ValueError, RuntimeError) as error:
            if not isinstance(error, KappaTuneError) and not NO_PATH.search(str(error)):
                raise
            Console(stderr=True, soft_wrap=True).print("Error: ", style="bold red", end="")
            Console(stderr=True, soft_wrap=True).print(str(error), style="red", markup=False, highlight=False)
            raise typer.Exit(2) from error

    return wrapped


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kappatune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Shared by all commands."""
    for stream in (sys.stdout, sys.stderr):
        # a path may hold bytes that are no character
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
