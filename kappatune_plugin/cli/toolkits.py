"""The commands of `kappatune` that have to do with other toolkits."""

from pathlib import Path
from typing import Annotated

import typer

from kappatune_plugin.cli.app import K_HELP, TAKES_MORE, TrustRemoteCode, app, clean_errors
from kappatune_plugin.console import console
from kappatune_plugin.selection.budget import DEFAULT_K, budget

COLORS = {"+": "green", "-": "red", "@": "cyan"}


@app.command()
@clean_errors
def convert(
    recipe: Annotated[Path, typer.Argument(help="A LoRA recipe of TRL, Axolotl or LLaMA-Factory, a YAML file.")],
    match: Annotated[
        str, typer.Option(help="params: train as many parameters as the LoRA; share: a tenth of the matrices.")
    ] = "params",
    k: Annotated[str | None, typer.Option("--k", help=f"Instead of --match. {K_HELP}")] = None,
    toolkit: Annotated[
        str | None, typer.Option(help="trl, axolotl or llamafactory; default: seen from the keys.")
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Write it; the old one is kept as NAME.lora.yaml.")] = False,
    output: Annotated[Path | None, typer.Option("--output", help="With --write: write here instead.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Turn a LoRA recipe into a KappaTune one; shows the change, writes nothing without --write."""
    from kappatune_plugin.toolkits.convert import convert_recipe

    converted = convert_recipe(recipe, match, budget(k) if k is not None else None, toolkit, trust_remote_code)
    out = console()
    for line in converted.diff():
        out.print(line, style=COLORS.get(line[:1]), markup=False, highlight=False, soft_wrap=True)
    out.print(f"\nFrom a LoRA recipe of {converted.toolkit.title}:", highlight=False)
    for note in converted.notes:
        out.print(f"- {note}", markup=False, highlight=False)
    if not write:
        typer.echo("\nNothing was written: add --write.")
        return
    target = converted.write(output)
    typer.echo(f"\nWritten to {target}. Train with\n  {converted.command(target)}")


@app.command()
@clean_errors
def plan(
    model: Annotated[str, typer.Argument(help="A model's folder, or its name on the hub.")],
    toolkit: Annotated[str, typer.Option("--for", help="axolotl, llamafactory, trl or ms-swift.")],
    k: Annotated[str, typer.Option("--k", help=K_HELP)] = str(DEFAULT_K),
    report: Annotated[
        Path | None, typer.Option(help="A kappa report of this model, from `kappatune scan`; default: scan it.")
    ] = None,
    widen: Annotated[
        bool, typer.Option("--widen", help="Choose what holds a matrix where the toolkit can't choose it alone.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Print config lines that train this selection with an unmodified toolkit."""
    from kappatune_plugin import KappaReport
    from kappatune_plugin.toolkits.plan import plan as plan_for

    loaded = KappaReport.load(report) if report is not None else None
    planned = plan_for(model, toolkit, budget(k), loaded, widen, trust_remote_code)
    for line in [*(f"# {note}" for note in planned.notes), *planned.lines]:
        typer.echo(line)


@app.command()
@clean_errors
def doctor() -> None:
    """What is installed, what works with it, and what to install."""
    from kappatune_plugin.cli.doctor import examine

    console().print(examine())


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
