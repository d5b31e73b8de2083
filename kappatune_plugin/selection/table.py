"""A kappa report as a table for a terminal 100 columns wide."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median

from rich import box
from rich.table import Table
from rich.text import Text

from kappatune_plugin.console import short_number
from kappatune_plugin.selection.chosen_table import chosen_table
from kappatune_plugin.selection.names import layer_and_type
from kappatune_plugin.selection.ranking import BOUNDED, rank_values
from kappatune_plugin.selection.report import KappaReport, UnitReport
from kappatune_plugin.selection.selection import Selection

ROWS_SHOWN_ONE_BY_ONE = 60
GROUP_NUMBERS = ("count", "shape", "kappa\nmin", "kappa\nmedian", "kappa\nmax", "kappa\n/null")


def report_tables(report: "KappaReport", selection: "Selection | None" = None, full: bool = False) -> list[Table]:
    """`report_table`; where it doesn't show each unit, and something is selected, `chosen_table` behind it."""
    tables = [report_table(report, selection, full)]
    if selection is not None and len(report.units) > ROWS_SHOWN_ONE_BY_ONE:
        tables.append(chosen_table(report, selection, full))
    return tables


def report_table(report: "KappaReport", selection: "Selection | None" = None, full: bool = False) -> Table:
    """A row a unit, lowest kappa first; from 61 units on a row a type, in the model's order.

    Args:
        full: from 61 units on a row for each layer and type.
    """
    chosen = {unit.name for unit in selection.units} if selection else set()
    many = len(report.units) > ROWS_SHOWN_ONE_BY_ONE
    table = Table(title=_title(report, chosen), caption=_caption(report, chosen, many), box=box.SIMPLE_HEAD)
    table.padding, table.pad_edge = 0, False
    table.title_justify = table.caption_justify = "left"
    fill = _fill_by_unit if not many else _fill_by_layer if full else _fill_by_type
    fill(table, report.units, chosen, *_ranked_by(report, selection))
    return table


def _ranked_by(report: "KappaReport", selection: "Selection | None") -> tuple[str, dict[str, float]]:
    """The selection's criterion and each unit's value, if the table doesn't show it anyway; else "" and {}."""
    if selection is None or selection.rank_by in BOUNDED:
        return "", {}
    return selection.rank_by, rank_values(report.units, selection.rank_by)


def _fill_by_unit(
    table: Table, units: Sequence["UnitReport"], chosen: set[str], rank_by: str, values: Mapping[str, float]
) -> None:
    _add_columns(table, ["unit"], ["shape", "kappa", "kappa\n/null"], rank_by, bool(chosen))

    def place(unit: "UnitReport") -> tuple:
        return unit.status != "ok", values.get(unit.name, unit.kappa or unit.lo or 0), unit.name

    for unit in sorted(units, key=place):
        numbers = [_number([unit], min), _number([unit], min, over_null=True)]
        if rank_by:
            numbers.append(short_number(values.get(unit.name)))
        cells = [_shapes([unit]), *numbers, unit.status]
        if chosen:
            cells.append("*" if unit.name in chosen else "")
        table.add_row(_name(unit.name.removesuffix(".weight"), unit), *cells)


def _fill_by_type(
    table: Table, units: Sequence["UnitReport"], chosen: set[str], rank_by: str, values: Mapping[str, float]
) -> None:
    _add_columns(table, ["units"], GROUP_NUMBERS, rank_by, bool(chosen))
    groups: dict[str, list[UnitReport]] = {}
    for unit in units:
        groups.setdefault(layer_and_type(unit.name)[1], []).append(unit)
    for kind, members in groups.items():
        cells = _group_cells(members, rank_by, values)
        if chosen:
            taken = [unit for unit in members if unit.name in chosen]
            layers, all_layers = (len({layer_and_type(unit.name)[0] for unit in each}) for each in (taken, members))
            cells.append(f"* {len(taken)} in {layers} of {all_layers} layers" if taken else "")
        table.add_row(_name(kind, members[0]), *cells)


def _group_cells(members: Sequence["UnitReport"], rank_by: str, values: Mapping[str, float]) -> list[str]:
    cells = [str(len(members)), _shapes(members), *_spread(members)]
    if rank_by:
        known = [values[unit.name] for unit in members if unit.name in values]
        cells.append(short_number(median(known) if known else None))
    return [*cells, _statuses(members)]


def _fill_by_layer(
    table: Table, units: Sequence["UnitReport"], chosen: set[str], rank_by: str, values: Mapping[str, float]
) -> None:
    _add_columns(table, ["layer", "units"], GROUP_NUMBERS, rank_by, bool(chosen))
    groups: dict[tuple[str, str], list[UnitReport]] = {}
    for unit in units:
        groups.setdefault(layer_and_type(unit.name), []).append(unit)
    shown = None
    for (layer, kind), members in groups.items():
        cells = _group_cells(members, rank_by, values)
        if chosen:
            taken = sum(unit.name in chosen for unit in members)
            cells.append(f"* {taken}" if taken else "")
        if shown is not None and layer != shown:
            table.add_section()
        table.add_row(Text(layer if layer != shown else ""), _name(kind, members[0]), *cells)
        shown = layer


def _add_columns(table: Table, names: Sequence[str], numbers: Sequence[str], rank_by: str, with_trained: bool) -> None:
    for heading in names:
        table.add_column(heading, overflow="fold")
    for heading in [*numbers, rank_by.replace("_", "\n", 1)] if rank_by else numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("status", overflow="fold")
    if with_trained:
        table.add_column("trained", justify="right")


def _spread(units: Sequence["UnitReport"]) -> list[str]:
    """Minimum, median and maximum of kappa, and the median of kappa/null, over the units that have them."""
    if len(units) == 1:
        return ["", _number(units, min), "", _number(units, min, over_null=True)]
    return [*(_number(units, number) for number in (min, median, max)), _number(units, median, over_null=True)]


def _number(units: Sequence["UnitReport"], number: Callable, over_null: bool = False) -> str:
    """`number` (min, median or max) of the kappas, with ">" if it depends on some that are only "above"."""
    scales = {unit.name: unit.null if over_null else 1 for unit in units}
    known = [unit.kappa / scales[unit.name] for unit in units if unit.status == "ok"]
    bounds = [unit.lo / scales[unit.name] for unit in units if unit.status == "above"]
    if not known and not bounds:
        return "-"
    exact = not bounds or (number is min and known and min(known) < min(bounds))
    return ("" if exact else ">") + short_number(number(known + bounds))


def _name(name: str, unit: "UnitReport") -> Text:
    return Text(f"{name} (router)" if "router" in unit.groups else name)


def _shapes(units: Iterable["UnitReport"]) -> str:
    shapes = {unit.shape for unit in units}
    return "x".join(map(str, shapes.pop())) if len(shapes) == 1 else "several"


def _statuses(units: Iterable["UnitReport"]) -> str:
    """ "ok", or what isn't: "2 zero, 1 nonfinite" """
    counts = Counter(unit.status for unit in units if unit.status != "ok")
    return ", ".join(f"{count} {status.removeprefix('rank_')}" for status, count in counts.items()) or "ok"


def _title(report: "KappaReport", chosen: set[str]) -> Text:
    title = f"{report.base['name']} ({report.dtype})\n{len(report.units)} weight matrices"
    if chosen:
        trained = [unit for unit in report.units if unit.name in chosen]
        values = sum(unit.shape[0] * unit.shape[1] for unit in trained)
        title += f", {len(trained)} trained (*), {values:,} values"
    return Text(title)


def _only_type(report: "KappaReport", chosen: set[str]) -> str | None:
    """The one type that all `chosen` are of, where its shape alone makes kappa low: a random one has the lowest too."""
    kinds = {layer_and_type(name)[1] for name in chosen}
    shapes = {unit.shape for unit in report.units if unit.name in chosen}
    nulls = {unit.shape: unit.null for unit in report.units}
    if len(kinds) != 1 or len(nulls) == 1 or not shapes or max(nulls[shape] for shape in shapes) > min(nulls.values()):
        return None
    return kinds.pop()


def _caption(report: "KappaReport", chosen: set[str], many: bool) -> Text:
    """What the numbers and the selection mean, and which weights aren't shown."""
    lines = ["kappa/null: kappa relative to a Gaussian matrix of the same shape."]
    if many and (kind := _only_type(report, chosen)):
        lines.append(f"All {len(chosen)} trained are {kind}: kappa follows the matrix's shape here (see kappa/null).")
    if many:
        lines.append("A row for each layer: `kappatune scan` and `kappatune select` with --table full.")
    above = sum(unit.status == "above" for unit in report.units)
    if above:
        lines.append(f"{above} matrices were measured only until it was certain that they are above (>) the lowest.")
    if report.left_out:
        lines.append(f"Left out: {_reasons(report)}.")
    return Text("\n".join(lines))


def _reasons(report: "KappaReport") -> str:
    return ", ".join(f"{count} {reason}" for reason, count in Counter(report.left_out.values()).items())


def ranked_and_left_out(report: "KappaReport") -> str:
    """ "58 were ranked, 2 of them without a kappa (2 zero), and 2 left out (1 excluded by 'head', ...)" """
    without = [unit for unit in report.units if unit.status not in ("ok", "above")]
    none = f", {len(without)} of them without a kappa ({_statuses(without)})" if without else ""
    left_out = f"{len(report.left_out)} left out ({_reasons(report)})" if report.left_out else "none left out"
    return f"{len(report.units)} were ranked{none}, and {left_out}"
