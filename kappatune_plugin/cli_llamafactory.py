"""The command `kappatune llamafactory`."""

from typing import Annotated

import typer

from kappatune_plugin.cli_app import TAKES_MORE, app, clean_errors


@app.command(context_settings=TAKES_MORE)
@clean_errors
def llamafactory(
    context: typer.Context,
    command: Annotated[str, typer.Argument(help="One of llamafactory-cli's: train, export, chat, api, webchat.")],
) -> None:
    """Run LLaMA-Factory as `llamafactory-cli` does, with `finetuning_type: kappatune` among its methods.

    What follows is LLaMA-Factory's own: x.yaml, and key=value to set a key of it.
    """
    from kappatune_plugin.toolkits.llamafactory import main

    main([command, *context.args])
