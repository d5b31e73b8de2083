"""The command that scales back what was trained until it keeps a limit of forgetting."""

from pathlib import Path
from typing import Annotated

import typer

from kappatune_plugin.cli.app import TAKES_MORE, app, clean_errors
from kappatune_plugin.console import console


@app.command(context_settings=TAKES_MORE)
@clean_errors
def interpolate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="An adapter (ours, LoRA, ...) or a checkpoint, trained from the base.")],
    config: Annotated[Path, typer.Option("--config", help="The recipe: base, data and a block forgetting.")],
    max_delta: Annotated[
        float,
        typer.Option("--max_delta", "--max-delta", help="Most that a control's loss may rise, in nats a token."),
    ],
    output_dir: Annotated[Path, typer.Option("--output_dir", "--output-dir", help="Where the result goes.")],
    per_matrix: Annotated[
        bool, typer.Option("--per_matrix/--one", "--per-matrix/--one", help="A scale for each matrix, or one for all.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output_dir that holds something.")] = False,
) -> None:
    """Scale back what was trained until it forgets no more than you allow; no training.

    --key value sets any key of the recipe, as in sft.
    """
    from kappatune_plugin.recipe.recipe import load_recipe
    from kappatune_plugin.run.interpolate import interpolate_trained

    recipe, out = load_recipe(config, context.args), console()
    dialed, report = interpolate_trained(recipe, model, output_dir, max_delta, per_matrix, overwrite, out.print)
    out.print(report.table())
    for sentence in dialed.sentences():
        out.print(f"- {sentence}", highlight=False, soft_wrap=True)
    out.print(f"The result is in {output_dir}, with interpolation.json and interpolation.png.", highlight=False)
