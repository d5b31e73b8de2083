"""What each decision adds within a limit of forgetting: differences between methods, seed by seed, with intervals."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from real_tables import LOSS, limits_of

from kappatune_plugin.study.summary import over_seeds, within_limit
from kappatune_plugin.study.tables import shown

Content = Mapping[str, Any]
EVERY = "*"
FORM = "{:+.3f}"
# an interval over fewer settings is too wide to say anything; over their runs it speaks of these settings alone
ENOUGH_SETTINGS = 4


@dataclass(frozen=True)
class Lever:
    """Pairs of methods whose difference says what a decision adds.

    Attributes:
        words: the decision, as tables name it.
        pairs: a method and the one it is compared with; EVERY for each method that there is.
        ways: how the two keep a limit: by "one" scale or "per_matrix", or by "rate", the best of those whose whole run
            keeps it, which is known of the first seed.
    """

    words: str
    pairs: tuple[tuple[str, str], ...]
    ways: tuple[str, str] = ("one", "one")


def _choice(ours: str, theirs: str, way: str = "one") -> Lever:
    return Lever(f"`{ours}` against `{theirs}`", ((ours, theirs),), (way, way))


GAIN, SHARE, GATE = (f"highest:rank_by={rank}" for rank in ("gain_over_forgetting", "expert_share", "expert_gate"))
REPLAYED = {name: f"{name}:replay=0.25" for name in ("lora", "full", "lowest_mlp")}
LEVERS = {
    "How the limit is kept": (
        Lever("scaled back, against the best rate that keeps it by itself", ((EVERY, EVERY),), ("one", "rate")),
        Lever("a quarter of replay, against none", tuple((each, name) for name, each in REPLAYED.items())),
    ),
    "Which matrices, by the rate alone": (
        _choice("lowest_mlp", "random_mlp", "rate"),
        _choice("lowest_mlp", "lora", "rate"),
    ),
    "Which matrices, beyond the dial: all scaled back": (
        _choice("lowest_mlp", "random_mlp"),
        _choice("lowest_mlp", "lora"),
        _choice("lowest_mlp", "lora_mlp"),
        _choice("lowest_mlp", "full"),
        _choice("highest", "lowest"),
        _choice("highest_mlp", "random_mlp"),
        _choice("lowest", "shape_matched_random"),
        _choice("lowest_mlp", "lowest"),
        _choice(GAIN, "random_mlp"),
        _choice(SHARE, "random_mlp"),
        _choice(GATE, "random_mlp"),
        _choice("random_mlp", "lora"),
        _choice("lora_mlp", "lora"),
        _choice("lora_mlp", "lowest"),
        _choice("full", "lora"),
    ),
    "Which matrices, beyond dial and replay": (
        _choice(REPLAYED["lowest_mlp"], REPLAYED["lora"]),
        _choice(REPLAYED["lowest_mlp"], REPLAYED["full"]),
    ),
}


def added(contents: Sequence[Content], lever: Lever, limit: float, key: str) -> dict[str, Any] | None:
    """How much higher `key` is within `limit` by the first of a lever's pairs than by the second.

    Returns:
        As `over_seeds` has it, and "over" what: from ENOUGH_SETTINGS on the settings ("5 settings"), else all seeds of
        those that have both ("6 runs in 2 settings", "3 seeds"); None where none has.
    """
    each = [found for content in contents if (found := _over_pairs(content, lever, limit, key))]
    if not each:
        return None
    if len(each) >= ENOUGH_SETTINGS:
        return {**over_seeds([statistics.fmean(values) for values in each]), "over": f"{len(each)} settings"}
    runs = [value for values in each for value in values]
    over = counted(len(runs), "seed") if len(each) == 1 else f"{counted(len(runs), 'run')} in {len(each)} settings"
    return {**over_seeds(runs), "over": over}


def counted(count: int, thing: str) -> str:
    """ "1 seed", "3 seeds"."""
    return f"{count} {thing}" + "s" * (count != 1)


def _over_pairs(content: Content, lever: Lever, limit: float, key: str) -> list[float]:
    """The mean difference over the pairs, one a seed that all of them have."""
    methods = {method["name"]: method for method in content["methods"]}
    pairs = [(name, name) for name in methods] if lever.pairs == ((EVERY, EVERY),) else lever.pairs
    found = []
    for pair in pairs:
        if not all(name in methods for name in pair):
            continue
        sides = [kept(content, methods[name], way, limit, key) for name, way in zip(pair, lever.ways, strict=True)]
        if all(sides):
            found.append([None if None in both else both[0] - both[1] for both in zip(*sides, strict=False)])
    seeds = [seed for seed in zip(*found, strict=False) if None not in seed]
    return [statistics.fmean(seed) for seed in seeds]


def kept(content: Content, method: Mapping[str, Any], way: str, limit: float, key: str) -> list[float | None]:
    """`key` of a method within the limit, one value a seed, or of the first seed alone; none where it isn't known."""
    if way == "rate":
        value = _by_rate(content, method, limit, key)
        return [] if value is None else [value]
    limits = (content["settings"].get("frontier") or {}).get("limits", ())
    point = within_limit(method, limits.index(limit), way) if limit in limits else None
    return point[key]["values"] if point and point.get(key) else []


def _by_rate(content: Content, method: Mapping[str, Any], limit: float, key: str) -> float | None:
    """Of the rates whose whole run keeps the limit, `key` of that of lowest held-out loss; the base's without one."""
    tried = [each for each in method["grid"].values() if each["final"] and each["validation_loss"] is not None]
    within = [each for each in tried if (risen := _risen(each["final"])) is not None and risen <= limit]
    if not within:
        return content["before"].get(key)
    return min(within, key=lambda each: each["validation_loss"])["final"].get(key)


def _risen(final: Mapping[str, Any]) -> float | None:
    """The rise of the control that rose most."""
    rises = [value for name, value in final.items() if name.endswith("_loss_change")]
    return None if None in rises else max(rises)


def is_clear(measure: Mapping[str, Any]) -> bool:
    """Whether the interval leaves out zero."""
    return measure["half"] is not None and abs(measure["mean"]) > measure["half"]


def difference(measure: Mapping[str, Any] | None, form: str) -> str:
    """ "+0.031 ± .020", in bold where the interval leaves out zero."""
    if measure is None:
        return ""
    text = shown(measure, form)
    return f"**{text}**" if is_clear(measure) else text


def by_limit(contents: Sequence[Content], lever: Lever) -> dict[float, dict[str, Any]]:
    """Limit -> how much higher the loss is by the first of a lever's pairs, where that is measured."""
    found = {limit: added(contents, lever, limit, LOSS) for limit in limits_of(contents)}
    return {limit: measure for limit, measure in found.items() if measure}


def told(words: str, found: Mapping[float, Mapping[str, Any]], note: str = "") -> str:
    """Differences of the loss that can be told from chance, by limit, as a sentence from `words` to `note`."""
    clear = {limit: each for limit, each in found.items() if is_clear(each)}
    parts = []
    for kind, sign in (("lower", -1), ("higher", 1)):
        there = [f"{limit:g} ({difference(each, FORM)})" for limit, each in clear.items() if sign * each["mean"] > 0]
        parts += [f"the loss is {kind} within {', '.join(there)}"] if there else []
    return f"{words[0].upper()}{words[1:]}: {'; '.join(parts) or 'no clear difference'}{note}."
