"""`include` and `exclude`: group names and globs on unit names; a pattern that matches nothing is an error."""

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.weights.units import WeightUnit

# norms and biases are never units, but recipes may name them to declare what they leave out
GROUPS = ("norm", "bias", "embedding", "head", "router", "attention", "mlp", "tower", "stack")
DEFAULT_EXCLUDE = ("norm", "bias", "embedding", "head")
# left out unless `include` has the group, or a glob that matches nothing outside of it
ASKED_FOR = {
    "tower": "beside the language model, as encoders of images or sound are: no gradient on text",
    "stack": "in a 3-D weight that isn't experts: what its matrices are is unknown",
}


def filter_units(
    units: Sequence[WeightUnit],
    include: Sequence[str] = (),
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    parameters: Iterable[str] = (),
) -> tuple[list[WeightUnit], dict[str, str]]:
    """Split `units` into those that may be trained and those left out.

    What `ASKED_FOR` lists is left out unless `include` names its group.

    Args:
        include: groups or globs; empty means every unit.
        exclude: groups or globs, removed from what `include` gives.
        parameters: names of all parameters of the model: a glob in `exclude` may match only parameters that are never
            units ("*layernorm*", "*.bias").

    Returns:
        The units kept, in order; and unit name -> the reason it was left out.

    Raises:
        KappaTuneError: patterns that match nothing, all of them in one message, each with near names.
    """
    for key, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise KappaTuneError(f"{key}: '{patterns}' is not a list: write [{patterns}].")
        if others := [pattern for pattern in patterns if not isinstance(pattern, str)]:
            raise KappaTuneError(f"{key}: {others[0]!r} is no pattern, expected a text such as '*.q_proj.weight'.")
    names = [unit.name for unit in units]
    problems = [_problem("include", pattern, names) for pattern in include if not _known(pattern, names)]
    others = [*names, *parameters]
    problems += [_problem("exclude", pattern, others) for pattern in exclude if not _known(pattern, others)]
    if problems:
        raise KappaTuneError("\n".join(problems))
    kept, left_out = [], {}
    asked_for = {group: [each for each in include if _names_only(each, group, units)] for group in ASKED_FOR}
    for unit in units:
        reason = _not_asked_for(unit, asked_for) or _reason_left_out(unit, include, exclude)
        if reason is None:
            kept.append(unit)
        else:
            left_out[unit.name] = reason
    return kept, left_out


def _names_only(pattern: str, group: str, units: Sequence[WeightUnit]) -> bool:
    if pattern in GROUPS:
        return pattern == group
    return all(group in unit.groups for unit in units if fnmatchcase(unit.name, pattern))


def _not_asked_for(unit: WeightUnit, asked_for: dict[str, list[str]]) -> str | None:
    for group, patterns in asked_for.items():
        if group in unit.groups and not any(_matches(pattern, unit) for pattern in patterns):
            return f"{ASKED_FOR[group]} (include: [{group}] ranks it)"
    return None


def _reason_left_out(unit: WeightUnit, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    if include and not any(_matches(pattern, unit) for pattern in include):
        return "not in include"
    for pattern in exclude:
        if _matches(pattern, unit):
            return f"excluded by '{pattern}'"
    return None


def module_type(name: str, groups: Iterable[str]) -> str | None:
    """ "attention" or "mlp" (includes experts) for a weight in a layer; None for all others and for routers."""
    if {"embedding", "head", "router"} & set(groups) or not re.search(r"\.\d+\.", f".{name}"):
        return None
    return "attention" if re.search("attn|attention", name.lower()) else "mlp"


def _matches(pattern: str, unit: WeightUnit) -> bool:
    if pattern not in GROUPS:
        return fnmatchcase(unit.name, pattern)
    return pattern in unit.groups or pattern == module_type(unit.name, unit.groups)


def _known(pattern: str, names: Sequence[str]) -> bool:
    return pattern in GROUPS or any(fnmatchcase(name, pattern) for name in names)


def _problem(key: str, pattern: str, names: Sequence[str]) -> str:
    text = f"{key}: '{pattern}' is not a group ({', '.join(GROUPS)}) and matches none of the {len(names)} weights."
    group = difflib.get_close_matches(pattern, GROUPS, n=1, cutoff=0.7)
    if group:
        return f"{text} Did you mean '{group[0]}'?"
    inside = f"*{pattern.strip('*')}*"
    if any(fnmatchcase(name, inside) for name in names):
        return f"{text} A glob has to match the whole name: write '{inside}'."
    near = difflib.get_close_matches(pattern.strip("*."), _endings(names), n=3, cutoff=0.5)
    near = [f"*{ending}*" for ending in near] or sorted(set(names))[:3]
    return f"{text} Near names: {', '.join(near)}."


def _endings(names: Iterable[str]) -> list[str]:
    """The last one or two words of weight names: "q_proj", "mlp.down_proj", ..."""
    words = set()
    for name in names:
        parts = [part for part in name.removesuffix(".weight").split(".") if not re.fullmatch(r"\d+", part)]
        words.update(parts[-2:])
        words.add(".".join(parts[-2:]))
    return sorted(words)
