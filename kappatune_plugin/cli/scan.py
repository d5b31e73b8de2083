"""The commands that rank the weight matrices of a model and choose among them."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from kappatune_plugin.cli.app import K_HELP, RankBy, TrustRemoteCode, app, clean_errors
from kappatune_plugin.console import console
from kappatune_plugin.selection.budget import DEFAULT_K, budget

TableRows = Annotated[
    Literal["summary", "full"],
    typer.Option("--table", help="summary: a row for each type of matrix; full: for each layer and type."),
]


@app.command()
@clean_errors
def scan(
    model: Annotated[str, typer.Argument(help="A model's folder, or its name on the hub.")],
    k: Annotated[str | None, typer.Option("--k", help=f"{K_HELP} Marked in the table; default: {DEFAULT_K}.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="A group or glob of what to rank; repeatable.")] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="One of what to leave out; repeatable. Default: norm, bias, embedding, head."),
    ] = None,
    rank_by: RankBy = "kappa",
    full: Annotated[
        bool, typer.Option("--full", help="Every kappa, not only what the selection of the K lowest needs.")
    ] = False,
    table: TableRows = "summary",
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Measure again what earlier scans measured.")] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw kappa by layer and type into this file.")] = None,
    output: Annotated[Path, typer.Option("--output", help="Where to write the report.")] = Path("kappa_report.json"),
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Rank a model's weight matrices by condition number; under torchrun each process measures its share."""
    from kappatune_plugin import scan as scan_model
    from kappatune_plugin import select as select_units
    from kappatune_plugin.distributed import ranks
    from kappatune_plugin.files import check_output, opening
    from kappatune_plugin.selection.selection import check_settings
    from kappatune_plugin.selection.table import report_tables
    from kappatune_plugin.weights.patterns import DEFAULT_EXCLUDE

    wanted = DEFAULT_K if k is None else budget(k)
    check_settings(wanted, "lowest", rank_by, 0)
    check_output(output, opening("units"))
    if plot is not None:
        from kappatune_plugin.selection.plot import PICTURE, check_format

        check_output(plot, PICTURE)
        check_format(plot)
    ranks.join()
    report = scan_model(
        model,
        include=include or (),
        exclude=DEFAULT_EXCLUDE if exclude is None else exclude,
        trust_remote_code=trust_remote_code,
        cache=not no_cache,
        k=None if full or plot else wanted,
        refuse_more=k is not None and not (full or plot),
        rank_by=rank_by,
    )
    if ranks.rank() > 0:
        return
    report.save(output)
    # a model of fewer matrices than the default has nothing to mark; asked for by name, it is an error
    enough = k is not None or sum(unit.status in ("ok", "above") for unit in report.units) >= DEFAULT_K
    selection = select_units(report, k=wanted, rank_by=rank_by) if enough else None
    console().print(*report_tables(report, selection, table == "full"))
    if plot is not None:
        from kappatune_plugin.selection.plot import plot_report

        plot_report(report, plot, selection)
        typer.echo(f"The plot is in {plot}.")
    typer.echo(f"The report is in {output}.")


@app.command()
@clean_errors
def select(
    report: Annotated[Path, typer.Argument(help="A kappa report, from `kappatune scan` or a run.")],
    k: Annotated[str, typer.Option("--k", help=K_HELP)] = str(DEFAULT_K),
    order: Annotated[
        str, typer.Option(help="lowest; the controls are highest, random, shape_matched_random.")
    ] = "lowest",
    rank_by: RankBy = "kappa",
    seed: Annotated[int, typer.Option(help="Of the random orders.")] = 0,
    within: Annotated[Path | None, typer.Option(help="A selection: choose among its matrices only.")] = None,
    table: TableRows = "summary",
    output: Annotated[Path, typer.Option("--output", help="Where to write the selection.")] = Path("selection.json"),
) -> None:
    """Choose what to train from a report."""
    from kappatune_plugin import KappaReport
    from kappatune_plugin import select as select_units
    from kappatune_plugin.files import check_output, opening
    from kappatune_plugin.selection.selection import Selection
    from kappatune_plugin.selection.selection import within as rows_within
    from kappatune_plugin.selection.table import report_tables

    check_output(output, opening("k"))
    loaded = KappaReport.load(report)
    if within is not None:
        loaded = rows_within(loaded, Selection.load(within))
    selection = select_units(loaded, k=budget(k), order=order, rank_by=rank_by, seed=seed)
    selection.save(output)
    console().print(*report_tables(loaded, selection, table == "full"))
    typer.echo(f"{len(selection.units)} matrices are selected; the selection is in {output}.")
