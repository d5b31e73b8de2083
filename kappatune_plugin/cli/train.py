"""The commands that train a model and make a plain checkpoint of what was trained."""

from pathlib import Path
from typing import Annotated

import typer

from kappatune_plugin.cli.app import TAKES_MORE, TrustRemoteCode, app, clean_errors


@app.command(context_settings=TAKES_MORE)
@clean_errors
def sft(
    context: typer.Context,
    config: Annotated[Path, typer.Option("--config", help="The recipe, a YAML file.")],
) -> None:
    """Fine-tune as a recipe says.

    --key value sets any key of it: --learning_rate 1e-4, --kappatune.k 10%, --data.train.split 'train[:20]'.
    Where there are several GPUs, or `accelerate config` was run, it runs in several processes, as `trl sft` does.
    --accelerate_config zero3 (or a path) and the flags of `accelerate launch`, such as --num_processes, say how.
    """
    from kappatune_plugin.distributed.ranks import is_launched
    from kappatune_plugin.recipe.launch_keys import split_words
    from kappatune_plugin.recipe.recipe import load_recipe
    from kappatune_plugin.recipe.text import read_yaml
    from kappatune_plugin.run.launch import launch, starts_several
    from kappatune_plugin.run.train import needs_one_process, run_sft

    launch_words, words = split_words(context.args, read_yaml(config)[0])
    # a mistake in the recipe is one message, not one from each process
    recipe = load_recipe(config, words, launches=not is_launched())
    alone = recipe.training_args.use_cpu or needs_one_process(recipe)
    if not is_launched() and (launch_words or (starts_several() and not alone)):
        launch(launch_words, ["sft", "--config", str(config), *words])
    else:
        run_sft(recipe)


@app.command()
@clean_errors
def merge(
    adapter: Annotated[Path, typer.Argument(help="The output_dir of a run, or one of its checkpoints.")],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="The folder to write.")],
    model: Annotated[str | None, typer.Option(help="The base model; default: the one that the adapter names.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint in output_dir.")] = False,
    dtype: Annotated[
        str | None, typer.Option(help="Of the checkpoint, such as float32; default: that of the base.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write the base model with the trained values in it, a plain checkpoint."""
    from kappatune_plugin.export.merge import merge_adapter

    merge_adapter(adapter, output_dir, model, overwrite, trust_remote_code, dtype)
    typer.echo(f"The merged model is in {output_dir}.")
