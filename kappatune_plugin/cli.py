"""The command `kappatune`. What is heavy is imported by the command that needs it."""

from pathlib import Path
from typing import Annotated

import typer

from kappatune_plugin import cli_eval, cli_llamafactory, cli_study, cli_toolkits  # noqa: F401  they add their commands
from kappatune_plugin.cli_app import K_HELP, TAKES_MORE, RankBy, TrustRemoteCode, app, budget, clean_errors
from kappatune_plugin.console import console
from kappatune_plugin.errors import KappaTuneError


def main() -> None:
    """The console command."""
    app()


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
    from kappatune_plugin.launch import is_launched, launch, split_words, starts_several
    from kappatune_plugin.recipe import load_recipe
    from kappatune_plugin.recipe_yaml import read_yaml
    from kappatune_plugin.run import needs_one_process, run_sft

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
def scan(
    model: Annotated[str, typer.Argument(help="A model's folder, or its name on the hub.")],
    k: Annotated[str | None, typer.Option("--k", help=f"{K_HELP} Marked in the table; default: 75.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="A group or glob of what to rank; repeatable.")] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="One of what to leave out; repeatable. Default: norm, bias, embedding, head."),
    ] = None,
    rank_by: RankBy = "kappa",
    full: Annotated[
        bool, typer.Option("--full", help="Every kappa, not only what the selection of the K lowest needs.")
    ] = False,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", "--no_cache", help="Measure again what earlier scans have measured.")
    ] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw kappa by layer and type into this file.")] = None,
    output: Annotated[Path, typer.Option("--output", help="Where to write the report.")] = Path("kappa_report.json"),
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Rank a model's weight matrices by condition number; under torchrun each process measures its share."""
    from kappatune_plugin import distributed
    from kappatune_plugin import scan as scan_model
    from kappatune_plugin import select as select_units
    from kappatune_plugin.config import DEFAULT_K
    from kappatune_plugin.patterns import DEFAULT_EXCLUDE
    from kappatune_plugin.run import check_writable
    from kappatune_plugin.selection import check_settings

    wanted = DEFAULT_K if k is None else budget(k)
    check_settings(wanted, "lowest", rank_by, 0)
    for path in (output, plot):
        if path is not None:
            check_writable(path.parent)
            if path.is_dir():
                raise KappaTuneError(f"Can't write '{path}': it is a folder. Give the name of a file in it.")
    if plot is not None:
        from kappatune_plugin.plots import check_format

        check_format(plot)
    distributed.join()
    report = scan_model(
        model,
        include=include or (),
        exclude=DEFAULT_EXCLUDE if exclude is None else exclude,
        trust_remote_code=trust_remote_code,
        cache=not no_cache,
        k=None if full or plot else wanted,
        rank_by=rank_by,
    )
    if distributed.rank() > 0:
        return
    report.save(output)
    # a model of fewer matrices than the default has nothing to mark; asked for by name, it is an error
    enough = k is not None or sum(unit.status in ("ok", "above") for unit in report.units) >= DEFAULT_K
    selection = select_units(report, k=wanted, rank_by=rank_by) if enough else None
    console().print(report.table(selection))
    if plot is not None:
        from kappatune_plugin.plots import plot_report

        plot_report(report, plot)
        typer.echo(f"The plot is in {plot}.")
    typer.echo(f"The report is in {output}.")


@app.command()
@clean_errors
def select(
    report: Annotated[Path, typer.Argument(help="A kappa report, from `kappatune scan` or a run.")],
    k: Annotated[str, typer.Option("--k", help=K_HELP)] = "75",
    order: Annotated[
        str, typer.Option(help="lowest; the controls are highest, random, shape_matched_random.")
    ] = "lowest",
    rank_by: RankBy = "kappa",
    seed: Annotated[int, typer.Option(help="Of the random orders.")] = 0,
    output: Annotated[Path, typer.Option("--output", help="Where to write the selection.")] = Path("selection.json"),
) -> None:
    """Choose what to train from a report."""
    from kappatune_plugin import KappaReport
    from kappatune_plugin import select as select_units

    loaded = KappaReport.load(report)
    selection = select_units(loaded, k=budget(k), order=order, rank_by=rank_by, seed=seed)
    selection.save(output)
    console().print(loaded.table(selection))
    typer.echo(f"{len(selection.units)} matrices are selected; the selection is in {output}.")


@app.command()
@clean_errors
def merge(
    adapter: Annotated[Path, typer.Argument(help="The output_dir of a run, or one of its checkpoints.")],
    output_dir: Annotated[Path, typer.Option("--output_dir", "--output-dir", help="The folder to write.")],
    model: Annotated[str | None, typer.Option(help="The base model; default: the one that the adapter names.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in output_dir.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write the base model with the trained values in it, a plain checkpoint."""
    from kappatune_plugin.merge import merge_adapter

    merge_adapter(adapter, output_dir, model, overwrite, trust_remote_code)
    typer.echo(f"The merged model is in {output_dir}.")
