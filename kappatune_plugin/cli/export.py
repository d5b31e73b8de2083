"""The command that writes an adapter in a form that others load."""

from pathlib import Path
from typing import Annotated

import typer

from kappatune_plugin.cli.app import TrustRemoteCode, app, clean_errors
from kappatune_plugin.console import console


@app.command()
@clean_errors
def export(
    adapter: Annotated[Path, typer.Argument(help="The output_dir of a run, or one of its checkpoints.")],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="The folder to write.")],
    form: Annotated[str, typer.Option("--as", help="merged, patch, lora or gguf-ready.")] = "merged",
    model: Annotated[str | None, typer.Option(help="The base model; default: the one that the adapter names.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of LoRA's matrices; default: as --share asks for.")] = None,
    share: Annotated[float, typer.Option(help="Of the norm of each change that LoRA keeps, at least.")] = 0.99,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint in output_dir.")] = False,
    dtype: Annotated[str | None, typer.Option(help="Of a whole checkpoint; default: that of the base.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="A recipe: measure what the export learned and forgot beside it.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write an adapter as what loads without this package.

    merged: a plain checkpoint. patch: the changed tensors, with an index that lays them over the base's files.
    lora: the nearest LoRA adapter, and what it loses. gguf-ready: a plain checkpoint for llama.cpp's converter.
    """
    from kappatune_plugin.export.export import export_adapter, sizes

    recipe = None
    if config is not None:
        from kappatune_plugin.recipe.recipe import load_recipe
        from kappatune_plugin.run.evaluate import check_recipe, evaluate

        # what can't be measured is said before the work
        recipe = load_recipe(config, [])
        check_recipe(recipe, [str(adapter)])
    lost = export_adapter(adapter, output_dir, form, model, overwrite, trust_remote_code, dtype, rank, share)
    out = console()
    if lost is not None:
        for name, error in lost.errors.items():
            out.print(f"{name}: {error:.2%} of the change is lost at rank {lost.rank}", highlight=False, soft_wrap=True)
    out.print(f"The export is in {output_dir}: {sizes(output_dir)}.", highlight=False, soft_wrap=True)
    if recipe is not None:
        out.print(evaluate(recipe, [str(adapter), str(output_dir)]).table())
