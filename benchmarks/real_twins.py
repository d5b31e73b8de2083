"""What docs/RESULTS.md says of settings that are others but for one thing: no end token, a scale a matrix."""

from collections.abc import Mapping, Sequence
from typing import Any

import study_real
from levers import EVERY, FORM, Lever, by_limit, counted, difference, kept, told
from real_tables import LOSS, TASKS, head, limits_of, within

from kappatune_plugin.study.summary import over_seeds

Contents = Mapping[str, Mapping[str, Any]]
EACH_MATRIX = Lever("against one for all", ((EVERY, EVERY),), ("per_matrix", "one"))


def end_token(contents: Contents) -> str:
    """What leaving the end token out changes, method by method; "" where no setting has both."""
    rows = []
    for name, content in contents.items():
        other = contents.get(name.removesuffix(study_real.NO_END))
        if name.endswith(study_real.NO_END) and other is not None:
            rows += head(["", *within(limits_of([content])), "rise, all kept"])
            rows += [_without_end(content, other, method) for method in content["methods"]]
    return "\n".join([END_TOKEN, *rows, ""]) if rows else ""


END_TOKEN = """## What the end token does

Trained without an end token behind each answer, against with one: differences of the loss of the right label on test
rows within each limit, and of the rise with all that was trained kept (nats a token), seed by seed; in bold where the
95% interval leaves out zero.
"""


def _without_end(content: Mapping[str, Any], twin: Mapping[str, Any], method: Mapping[str, Any]) -> str:
    other = next((each for each in twin["methods"] if each["name"] == method["name"]), None)
    if other is None or not all("points" in each["frontier"] for each in (method, other)):
        return f"| `{method['name']}` |"
    sides = [
        (kept(content, method, "one", limit, LOSS), kept(twin, other, "one", limit, LOSS))
        for limit in limits_of([content])
    ]
    sides.append(tuple(each["frontier"]["points"][-1]["rise"]["values"] for each in (method, other)))
    return f"| `{method['name']}` | {' | '.join(_differences(sides))} |"


def per_matrix(contents: Contents) -> str:
    """What a scale for each matrix adds to one for all, method by method; "" where it isn't measured."""
    there = {name: each for name, each in contents.items() if name.endswith(study_real.PER_MATRIX)}
    limits = limits_of(there.values())
    rows = head(["", *within(limits)])
    for name, content in there.items():
        task = TASKS[name.removesuffix(study_real.PER_MATRIX).partition("-")[2]]
        for method in content["methods"]:
            ways = ("per_matrix", "one")
            sides = [tuple(kept(content, method, way, limit, LOSS) for way in ways) for limit in limits]
            rows.append(f"| `{method['name']}`, {task} | {' | '.join(_differences(sides))} |")
    return "\n".join([EACH, *rows, ""]) if there else ""


def per_matrix_in_short(contents: Contents) -> str:
    """The same over all methods and settings that have it, as a sentence."""
    there = [each for name, each in contents.items() if name.endswith(study_real.PER_MATRIX)]
    found = by_limit(there, EACH_MATRIX)
    if not found:
        return ""
    methods = counted(max(len(each["methods"]) for each in there), "method")
    over = next(iter(found.values()))["over"]
    return told(EACH_MATRIX.words, found, f" (mean of {methods}, {over})")


EACH = """## A scale a matrix, against one for all

Of the same runs, scaled back by [a scale for each matrix](dial.md) and by one for all: differences of the loss on test
rows within each limit (nats a token; below zero the scales a matrix keep more of what was learned), seed by seed; in
bold where the 95% interval leaves out zero.
"""


def _differences(sides: Sequence[tuple[Sequence[float | None], Sequence[float | None]]]) -> list[str]:
    return [
        difference(over_seeds([a - b for a, b in zip(*pair, strict=False) if None not in (a, b)]), FORM)
        for pair in sides
    ]
