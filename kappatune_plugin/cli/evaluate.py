"""The command that measures models trained before."""

from pathlib import Path
from typing import Annotated

import typer

from kappatune_plugin.cli.app import TAKES_MORE, app, clean_errors
from kappatune_plugin.console import console


@app.command(name="eval", context_settings=TAKES_MORE)
@clean_errors
def evaluate(
    context: typer.Context,
    config: Annotated[Path, typer.Option("--config", help="The recipe, with a block forgetting.")],
    models: Annotated[
        str | None,
        typer.Option(
            help="Adapters (of any PEFT method) and checkpoints trained from the recipe's model, separated by commas. "
            "Default: the recipe's output_dir."
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", help="Where to write what was measured.")] = Path("eval.json"),
) -> None:
    """Measure what models trained before have learned and forgotten, beside their base.

    --key value sets any key of the recipe, as in sft.
    """
    from kappatune_plugin.files import check_output, opening
    from kappatune_plugin.recipe.recipe import load_recipe
    from kappatune_plugin.run.evaluate import evaluate

    recipe = load_recipe(config, context.args)
    check_output(output, opening("base"))
    places = [recipe.training_args.output_dir] if models is None else [each.strip() for each in models.split(",")]
    evaluation = evaluate(recipe, places, lambda found: found.save(output))
    console().print(evaluation.table())
    typer.echo(f"What was measured is in {output}.")
