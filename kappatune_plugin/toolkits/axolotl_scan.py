"""`axolotl kappatune-scan x.yaml`: what `axolotl train x.yaml` would choose.

Axolotl 0.19 or later finds it by the entry point in pyproject.toml, and brings click.
"""

from pathlib import Path
from typing import Any

import click
import yaml

from kappatune_plugin.errors import KappaTuneError

# with one of these in the block nothing is left to measure
MADE_EARLIER = ("report", "selection")


@click.command("kappatune-scan")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("kappa_report.json"), help="Where to write the report."
)
@click.option("--full", is_flag=True, help="A row for each layer and type.")
def kappatune_scan(config: Path, output: Path, full: bool) -> None:
    """Rank base_model's matrices by condition number and mark what CONFIG would train."""
    from kappatune_plugin.console import console

    try:
        tables = scan_config(config, output, full)
    except KappaTuneError as error:
        raise click.ClickException(str(error)) from error
    console().print(*tables)
    click.echo(f"The report is in {output}. Train by it with `report: {output}` in the block kappatune.")


def scan_config(config: Path, output: Path, full: bool = False) -> list[Any]:
    """Measure what the block `kappatune:` of an Axolotl YAML chooses among, and write the report to `output`.

    Returns:
        the tables to show.

    Raises:
        KappaTuneError: the file doesn't fit KappaTune, it names a report or a selection, or the model can't be read.
    """
    from kappatune_plugin import scan, select
    from kappatune_plugin.files import check_output, opening
    from kappatune_plugin.selection.table import report_tables

    model, settings, trusted = _read(config)
    check_output(output, opening("units"))
    chosen_by = {key: getattr(settings, key) for key in ("order", "rank_by", "seed")}
    report = scan(
        model,
        include=settings.include or (),
        **({} if settings.exclude is None else {"exclude": settings.exclude}),
        rtol=settings.rtol,
        trust_remote_code=trusted,
        scan_from=settings.scan_from,
        k=settings.k,
        **chosen_by,
    )
    report.save(output)
    return report_tables(report, select(report, k=settings.k, **chosen_by), full)


def _read(config: Path) -> tuple[str, Any, bool]:
    """The model, the checked block with its `k`, and whether code of the model's may run."""
    from kappatune_plugin.schema import read
    from kappatune_plugin.selection.budget import DEFAULT_K
    from kappatune_plugin.toolkits.axolotl_args import axolotl_problems
    from kappatune_plugin.tuner.config import KappaTuneSettings
    from kappatune_plugin.version import NAME

    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise KappaTuneError(f"'{config}' is no YAML: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("base_model"), str):
        raise KappaTuneError(f"'{config}' has no base_model: expected a YAML file of Axolotl's.")
    settings, problems = read(KappaTuneSettings, content.get(NAME), f"{NAME}.")
    problems = [*axolotl_problems(content), *problems]
    if settings is None or problems:
        raise KappaTuneError("\n  - ".join([f"'{config}' doesn't fit KappaTune:", *problems]))
    for key in MADE_EARLIER:
        if getattr(settings, key) is not None:
            raise KappaTuneError(f"{NAME}.{key} in '{config}' was made earlier: nothing is left to scan. Remove it.")
    if settings.k is None:
        settings = settings.model_copy(update={"k": DEFAULT_K})
    return content["base_model"], settings, bool(content.get("trust_remote_code"))
