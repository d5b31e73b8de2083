"""Mean ranks of methods over settings, and how far apart they are by chance.

Friedman's ranks and Nemenyi's critical difference, as J. Demsar has them (Statistical Comparisons of Classifiers over
Multiple Data Sets, JMLR 7, 2006, section 3.2.2): losses of different tasks are of different sizes, their ranks aren't.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from figures import method_of
from levers import ENOUGH_SETTINGS
from real_tables import LOSS, RIGHT, head, limits_of, within
from scipy.stats import rankdata, studentized_range

from kappatune_plugin.study.summary import within_limit

Contents = Sequence[Mapping[str, Any]]


def mean_ranks(contents: Contents, limit: float, key: str) -> tuple[dict[str, float], int]:
    """Method -> its mean rank within `limit`, 1 for the lowest loss or most right answers, and over how many settings.

    Only methods that all settings have are ranked, by their means over seeds, and only settings that measure `key`.
    """
    there = [each for each in contents if key in each["before"] and limit in limits_of([each])]
    names = [name for name in _names(there[0]) if all(name in _names(each) for each in there)] if there else []
    ranks = [rankdata([_mean(each, name, limit, key) for name in names]) for each in there]
    means = [float(statistics.fmean(column)) for column in zip(*ranks, strict=True)]
    return dict(zip(names, means, strict=True)), len(there)


def _names(content: Mapping[str, Any]) -> list[str]:
    return [each["name"] for each in content["methods"] if "within" in each["frontier"]]


def _mean(content: Mapping[str, Any], name: str, limit: float, key: str) -> float:
    """Lower is better; infinite where no seed's is finite."""
    measure = within_limit(method_of(content, name), limits_of([content]).index(limit))[key]
    return math.inf if measure is None else measure["mean"] * (-1 if key == RIGHT else 1)


def critical_difference(methods: int, settings: int) -> float:
    """Mean ranks closer than this may be so by chance, at 95% over all pairs of methods."""
    return float(studentized_range.ppf(0.95, methods, 1e6) * (methods * (methods + 1) / (12 * settings)) ** 0.5)


def table(contents: Contents) -> str:
    """All methods in the order of their mean rank; "" for too few settings."""
    limits = limits_of(contents)
    found = {limit: [mean_ranks(contents, limit, key) for key in (LOSS, RIGHT)] for limit in limits}
    if not limits or min(count for each in found.values() for _, count in each) < ENOUGH_SETTINGS:
        return ""
    rows = head(["", *within(limits)])
    overall = {name: sum(found[limit][0][0][name] for limit in limits) for name in found[limits[0]][0][0]}
    for name in sorted(overall, key=overall.__getitem__):
        cells = ["; ".join(f"{ranks[name]:.1f}" for ranks, _ in found[limit]) for limit in limits]
        rows.append(f"| `{name}` | {' | '.join(cells)} |")
    (ranks, settings), (_, labelled) = found[limits[0]]
    apart = [critical_difference(len(ranks), count) for count in (settings, labelled)]
    return TABLE.format(
        methods=len(ranks), settings=settings, labelled=labelled, loss=apart[0], right=apart[1], rows="\n".join(rows)
    )


TABLE = """## Over all settings

Mean ranks of {methods} methods, all scaled back to each limit: of the loss on test rows over {settings} settings; of
the right answers over the {labelled} that have labels. 1 is the best. Two methods that are less than {loss:.1f} apart
in the first, or {right:.1f} in the second, may be so by chance (Nemenyi's critical difference, 95% over all pairs).

{rows}
"""


def sentence(contents: Contents, limit: float) -> str:
    """Who has the best mean rank of the loss within `limit`, and against whom by more than chance; "" for too few."""
    ranks, settings = mean_ranks(contents, limit, LOSS)
    if settings < ENOUGH_SETTINGS or not ranks:
        return ""
    best = min(ranks, key=ranks.__getitem__)
    apart = critical_difference(len(ranks), settings)
    worse = [f"`{name}`" for name, rank in ranks.items() if rank - ranks[best] > apart]
    return f"{limit:g} `{best}` ({ranks[best]:.1f}; by more than chance ahead of {', '.join(worse) or 'none'})"
