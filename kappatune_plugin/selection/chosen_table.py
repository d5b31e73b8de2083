"""What a selection takes, in its order, where the cut lies and what comes next: a table for a terminal."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from kappatune_plugin.console import short_number
from kappatune_plugin.selection.ranking import BOUNDED, RANDOM, rank_values, ranked
from kappatune_plugin.selection.report import KappaReport, UnitReport
from kappatune_plugin.selection.selection import Selection

# of a selection that isn't shown whole: the first ones, the last ones before the cut, and those behind it
FIRST, LAST, NEXT = 8, 4, 3


def chosen_table(report: KappaReport, selection: Selection, full: bool = False) -> Table:
    """A row a chosen matrix, in the order of the criterion, then the first ones behind the cut.

    Of many only the first and the last; a random selection is in the order of its kappas, and nothing is behind it.

    Args:
        full: all that are chosen.
    """
    rows = {row.name: row for row in report.units}
    chosen = [rows[unit.name] for unit in selection.units]
    values, behind = rank_values(report.units, selection.rank_by), []
    if selection.order in RANDOM:
        chosen.sort(key=lambda row: row.kappa or row.lo or 0)
    else:
        taken = {row.name for row in chosen}
        ranking = ranked(report.units, selection.rank_by, selection.order == "highest")
        behind = [row for row in ranking if row.name not in taken][:NEXT]
    table = Table(title=_title(selection), box=box.SIMPLE_HEAD, padding=0, pad_edge=False, title_justify="left")
    table.add_column("", justify="right")
    table.add_column("unit", overflow="fold")
    more = [] if selection.rank_by in BOUNDED else [selection.rank_by.replace("_", "\n", 1)]
    for heading in ("shape", "kappa", "kappa\n/null", *more):
        table.add_column(heading, justify="right", no_wrap=True)
    hidden = 0 if full or len(chosen) <= FIRST + LAST + 1 else len(chosen) - FIRST - LAST
    for place, row in enumerate(chosen, 1):
        if not hidden or place <= FIRST or place > FIRST + hidden:
            table.add_row(*_cells(place, row, values if more else {}), end_section=place == len(chosen))
        elif place == FIRST + 1:
            table.add_row("", f"... {hidden} more (--table full)")
    for place, row in enumerate(behind, len(chosen) + 1):
        table.add_row(*_cells(place, row, values if more else {}), style="dim")
    return table


def _title(selection: Selection) -> Text:
    if selection.order in RANDOM:
        return Text(f"\nTrained ({selection.order}), lowest kappa first")
    return Text(f"\nTrained, {selection.order} {selection.rank_by} first (below the line: next)")


def _cells(place: int, row: UnitReport, values: Mapping[str, float]) -> Sequence[str | Text]:
    kappa = row.kappa if row.status == "ok" else None
    cells = [str(place), Text(row.name.removesuffix(".weight")), "x".join(map(str, row.shape)), short_number(kappa)]
    cells.append(short_number(kappa / row.null if kappa else None))
    return [*cells, short_number(values.get(row.name))] if values else cells
