"""The command line, called in this process."""

from typer.testing import CliRunner

from kappatune_plugin.cli.app import app


def kappatune(*words: object) -> tuple[int, str, str]:
    """`kappatune WORDS`: its exit code, what it printed and what it wrote to stderr; unexpected exceptions pass."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr
