"""Commands that compare methods and budgets on a recipe."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from kappatune_plugin.cli.app import TAKES_MORE, app, clean_errors
from kappatune_plugin.study import DEFAULT_METHODS, DEFAULT_SCALES

METHODS_HELP = (
    "Separated by commas: full, an order of KappaTune (lowest, random, ...; also with _mlp, _attention or _per_type), "
    "or any method of PEFT by name (lora, osf, ...; also with _mlp or _attention). NAME:key=value sets something; "
    "NAME:replay=0.25 mixes in text that the base writes, a quarter of all rows."
)
RATES_HELP = "The grid, separated by commas; one is chosen for each method on held-out rows."
Config = Annotated[Path, typer.Option("--config", help="The recipe, a YAML file, with a block forgetting.")]
Seeds = Annotated[int, typer.Option(help="How many, from the recipe's on; an interval needs 2 at least.")]
Every = Annotated[int | None, typer.Option(help="Steps between measurements. Default: a tenth of the run.")]
Smooth = Annotated[int, typer.Option(help="Steps that the smoothed training loss is the mean of.")]
TargetLoss = Annotated[
    float | None,
    typer.Option("--target_loss", help="Smoothed training loss to compare at. Default: the worst run's best."),
]
Validation = Annotated[float, typer.Option(help="Share of the training rows held out to choose learning rates on.")]
OutputDir = Annotated[Path | None, typer.Option("--output_dir", help="Default: the recipe's with -compare or -sweep.")]
Scales = Annotated[
    str,
    typer.Option(
        help="How much of what a finished run changed is kept where it is measured, beside 0 and 1; off for nothing."
    ),
]
Limits = Annotated[
    str | None,
    typer.Option(
        help="Of the rise of the control's loss, in nats a token: what is learned within each. Default: the recipe's "
        "forgetting.max_delta, or 0.01,0.02,0.05,0.1."
    ),
]


@app.command(context_settings=TAKES_MORE)
@clean_errors
def compare(
    context: typer.Context,
    config: Config,
    methods: Annotated[str, typer.Option(help=METHODS_HELP)] = DEFAULT_METHODS,
    seeds: Seeds = 3,
    learning_rates: Annotated[
        str | None,
        typer.Option("--learning_rates", help=f"{RATES_HELP} Default: the recipe's times 0.3, 1 and 3."),
    ] = None,
    widen: Annotated[
        int, typer.Option(help="Rates to add at most, one at a time, where a method's best is at an edge of the grid.")
    ] = 0,
    target_loss: TargetLoss = None,
    every: Every = None,
    smooth: Smooth = 10,
    stop_at_target: Annotated[bool, typer.Option("--stop_at_target", help="End every run at --target_loss.")] = False,
    validation: Validation = 0.1,
    output_dir: OutputDir = None,
    scales: Scales = DEFAULT_SCALES,
    limits: Limits = None,
) -> None:
    """Compare what methods learn and forget at the same training loss, on the same data order.

    Started again it goes on where it was. --key value sets any key of the recipe, as in sft.
    """
    from kappatune_plugin.study.session import Asked, compare_session

    asked = Asked(config, context.args, seeds, learning_rates, every, smooth, target_loss, validation, output_dir)
    compare_session(replace(asked, stop_at_target=stop_at_target, widen=widen, scales=scales, limits=limits), methods)


@app.command(context_settings=TAKES_MORE)
@clean_errors
def sweep(
    context: typer.Context,
    config: Config,
    k: Annotated[str, typer.Option("--k", help="Budgets, separated by commas.")] = "10%,25%,50%,100%",
    seeds: Seeds = 3,
    learning_rates: Annotated[
        str | None, typer.Option("--learning_rates", help=f"{RATES_HELP} Default: the recipe's alone.")
    ] = None,
    target_loss: TargetLoss = None,
    every: Every = None,
    smooth: Smooth = 10,
    validation: Validation = 0.1,
    output_dir: OutputDir = None,
    scales: Scales = DEFAULT_SCALES,
    limits: Limits = None,
) -> None:
    """Train with several budgets, and say which one to take.

    Started again it goes on where it was. --key value sets any key of the recipe, as in sft.
    """
    from kappatune_plugin.study.session import Asked, sweep_session

    asked = Asked(config, context.args, seeds, learning_rates, every, smooth, target_loss, validation, output_dir)
    sweep_session(replace(asked, scales=scales, limits=limits), k)
