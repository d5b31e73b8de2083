"""The command `kappatune`: words of the command line in, one call into another room out.

One module a group of commands, without logic of its own. What is heavy is imported by the command that needs it.
"""

from kappatune_plugin.cli import evaluate, export, interpolate, scan, study, toolkits, train  # noqa: F401  they add their commands
from kappatune_plugin.cli.app import app


def main() -> None:
    """The console command."""
    app()
