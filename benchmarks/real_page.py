"""docs/RESULTS.md: real models, who learns most within a limit of forgetting; whatever of it there are files of."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import dial
import ranks
import study_gpu
import study_real
from levers import ENOUGH_SETTINGS, FORM, LEVERS, Lever, added, by_limit, counted, difference, is_clear, told
from real_tables import LARGER, LEGEND, LOSS, MODELS, RIGHT, TASKS, every_method, head, limits_of, within, words_of
from real_twins import end_token, per_matrix, per_matrix_in_short

from kappatune_plugin.study.summary import leaders, over_seeds
from kappatune_plugin.study.tables import MEASURES, shown

Contents = Mapping[str, Mapping[str, Any]]
# a page of more isn't read in five minutes
PICTURES = 3
HEAD = """# Does it forget less?

Written by `python benchmarks/results.py` from the files in `docs/results`. Change the script, not this page.

**The question.** Fine-tuning makes a model worse at what isn't in its rows. Of all ways to fine-tune, which one learns
most while the loss on other text rises by no more than .01, .02, .05 or .1 nats a token? And what of that is owed to
the matrices that κ chooses, what to the learning rate, to scaling back ([the dial](dial.md)) and to replay?
"""


def names() -> list[str]:
    """The settings that the page knows, those of a model one after the other."""
    return [f"{model}-{task}" for model in MODELS for task in TASKS]


def text(
    contents: Contents, dialed: Sequence[Mapping[str, Any]], matrices: str, quality: Mapping[str, float] | None = None
) -> str:
    """The page.

    Args:
        contents: setting -> its comparison.
        dialed: the records of benchmarks/dial.py.
        matrices: the section on one matrix at a time.
        quality: of the mixture, as benchmarks/mixture.py writes it.
    """
    settings = without_twins(contents)
    parts = [HEAD, in_short(contents, dialed), ranks.table(list(settings.values())), how(contents, quality)]
    for place, (model, found) in enumerate(by_model(contents).items()):
        picture = f"\n![learned within two limits](results/{model}-limits.png)\n" if place < PICTURES else ""
        parts.append(f"## {MODELS[model]}\n\n{winners(found)}\n{picture}")
    parts += [what_adds(settings), per_matrix(contents), end_token(contents)]
    parts += [on_the_dial(dialed), matrices, unknown(contents)]
    parts += ["## Every method\n\n" + LEGEND if contents else ""]
    for name, content in contents.items():
        seeds = counted(len(content["settings"]["seeds"]), "seed")
        parts.append(f"### {words_of(name)} ({seeds})\n\n{every_method(content)}\n")
    return "\n".join(part for part in parts if part)


def without_twins(contents: Contents) -> dict[str, Mapping[str, Any]]:
    """`contents` without settings that are another one but for one thing."""
    return {name: each for name, each in contents.items() if not study_real.twin(name)}


def by_model(contents: Contents) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Model -> words for a task -> comparison."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, content in without_twins(contents).items():
        model, task = name.split("-")
        found.setdefault(model, {})[TASKS[task]] = content
    return found


def in_short(contents: Contents, dialed: Sequence[Mapping[str, Any]]) -> str:
    """The answers, from the files."""
    each_matrix, contents = per_matrix_in_short(contents), without_twins(contents)
    lines, limits = ["## In short\n"], limits_of(contents.values())
    if not contents:
        lines.append("- No comparison with tuned rates is in `docs/results` yet; what follows is all that is measured.")
    else:
        lines.append(most(contents, limits))
    ranked = [ranks.sentence(list(contents.values()), limit) for limit in limits]
    if ranked and all(ranked):
        lines.append(f"- **Best mean rank of the loss over {len(contents)} settings**: within {', '.join(ranked)}.")
    for heading, levers in LEVERS.items():
        if said := clear_ones(contents, levers):
            lines.append(f"- **{heading}.** {said}")
    lines += [f"- **A scale a matrix.** {each_matrix}"] if each_matrix else []
    said = [
        told(words, {limit: loss for limit, (loss, _) in found.items()}) for words, found in on_dial(dialed).items()
    ]
    if said:
        lines.append("- **SmolLM2 at one rate a method, not tuned (further down).** " + " ".join(said))
    lines.append(
        "- Models of 0.7 to 4.5 million parameters: [small models, and earlier studies](RESULTS-small-models.md)."
    )
    return "\n".join(lines) + "\n"


def most(contents: Contents, limits: Sequence[float]) -> str:
    """In how many settings each method has learned most, and in how many by more than chance."""
    parts, alone = [], []
    for limit in limits:
        there = [each for each in contents.values() if limit in limits_of([each])]
        found = [leaders(each, limits_of([each]).index(limit), LOSS) for each in there]
        best = Counter(leader[0] for leader in found if leader)
        parts.append(f"{limit:g} " + ", ".join(f"`{name}` {count}" for name, count in best.most_common()))
        several = [len(each["settings"]["seeds"]) > 1 for each in there]
        alone.append(str(sum(more and bool(one) and not one[1] for more, one in zip(several, found, strict=True))))
    return (
        f"- **Lowest loss, in how many of {len(contents)} settings**: within {'; '.join(parts)}. By more than chance "
        f"against every other method in {', '.join(alone)}."
    )


def clear_ones(contents: Contents, levers: Sequence[Lever]) -> str:
    """Of some decisions what can be told from chance, and which can't; "" where none is measured."""
    clear, unclear = [], []
    for lever in levers:
        found = by_limit(list(contents.values()), lever)
        if any(map(is_clear, found.values())):
            clear.append(told(lever.words, found))
        elif found:
            unclear.append(lever.words)
    return " ".join([*clear, *([f"No clear difference within any limit: {', '.join(unclear)}."] if unclear else [])])


def how(contents: Contents, quality: Mapping[str, float] | None = None) -> str:
    """The setting: what is measured how, and of which models."""
    before = ["task before", "WikiText before", "the other task before"]
    rows = head(["setting", "seeds", "methods", "steps", "trained in", *before])
    for name in [*study_real.SETTINGS, *(name for name in contents if name not in study_real.SETTINGS)]:
        content = contents.get(name)
        cells = ["not measured yet", *[""] * 6] if content is None else _before(content)
        rows.append(f"| {words_of(name)} | {' | '.join(cells)} |")
    larger = any(name.partition("-")[0] in LARGER for name in contents)
    mixture = "" if quality is None else MIXTURE.format(**quality)
    return f"{HOW}{mixture}{LARGER_SETTING if larger else ''}\n{chr(10).join(rows)}\n"


def _before(content: Mapping[str, Any]) -> list[str]:
    base = content["before"]
    return [
        str(len(content["settings"]["seeds"])),
        str(len(content["methods"])),
        str(content["steps"]),
        _precision(content["recipe"]),
        f"{base[RIGHT]:.1%} right, loss {base[LOSS]:.2f}" if RIGHT in base else f"loss {base[LOSS]:.2f}",
        f"{base['wikitext_loss']:.3f}" if "wikitext_loss" in base else "",
        f"{base['recall']:.1%} right" if "recall" in base else "",
    ]


def _precision(recipe: Mapping[str, Any]) -> str:
    where = "" if recipe.get("use_cpu") else ", on a GPU"
    return ("bfloat16, mixed" if recipe.get("bf16") else "float32") + where


HOW = f"""## The setting

- Each method trains {study_real.STEPS} steps of {study_real.ROWS} rows out of {study_real.TRAIN}, a tenth of them held
  out. Its rate is that of {study_real.RATES.replace(",", ", ")} with the lowest loss on the held-out rows (first seed).
- It is then scaled back to each limit, by held-out rows and one half of each control: {study_real.PARAGRAPHS}
  paragraphs of WikiText-2, and {study_real.WRITTEN} texts that the base wrote, {study_real.TOKENS} tokens of each. A
  limit is on the control that rose most. Learned is what {study_real.TEST} test rows say: the loss of the right answer,
  without an end token (nats a token), and of labels the share that is right; GSM8K's free answers have a loss alone.
- Tweets and reviews have {study_real.LONGEST} words at most; problems of GSM8K {study_real.LONGEST_PROBLEM} with their
  answer, and half as many rows: {study_real.ROWS // study_real.HALF} a step of
  {study_real.TRAIN // study_real.HALF}, and {study_real.TEST // study_real.HALF} to test. The base is measured in the
  precision that a setting trains in. On a GPU products of float32 have TF32's digits.
- `lowest` and `highest` train the tenth of the matrices with the lowest and the highest κ, `_mlp` of those within the
  MLP; `random_mlp` draws them there, with each seed anew (`:seed=100` three more times); `shape_matched_random` draws
  as many of each shape as `lowest` has; `rank_by=` ranks by something else: the measured gain over forgetting, or a
  mixture's experts by ESFT's share of tokens or mean gate; `within=` draws the line by that first, then ranks by κ.
- `lora`, `lora_mlp`, `osf`: LoRA on all linear layers, LoRA within the MLP, OSF, of as many parameters as `lowest`
  has; `full`: everything. `replay=0.25`: a quarter of the rows is text that the base wrote.
- Another task isn't trained, only asked ({study_real.ASKED} rows): what becomes of it is in the tables at the end.
- ± is the 95% interval of Student's t over seeds, which share the test rows: with {study_real.TEST} of them a share of
  a half has a standard error of {100 * (0.25 / study_real.TEST) ** 0.5:.1f} points besides.
- What it took: SmolLM2's irony and SST-2 about two hours of a CPU core and 7 GB each, irony without the end token half
  an hour, with a scale a matrix nearly two hours each; the rest ten minutes of an H100, sixteen runs side by side, of
  at most 9 GB of its memory each.
"""


MIXTURE = """- The mixture (`benchmarks/mixture.py`): SmolLM2 with each MLP divided into 8 experts, 6 of them active,
  and distilled. Its loss on WikiText's test part is {mixture:.3f}, the dense model's {dense:.3f} ({tokens} tokens).
  What both make of the tasks untrained stands in the table.
"""


LARGER_SETTING = f"""- {", ".join(MODELS[model] for model in LARGER)}: {study_gpu.STEPS} steps of 4 rows, rates of
  {study_gpu.RATES.replace(",", ", ")} and one beyond where an edge is best; 300 test rows, 300 of the other task.
"""


def winners(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A row a task and limit: who has learned most, and how many methods it may be by chance."""
    chance = "may be chance against"
    rows = head(["task", "limit", "lowest loss", chance, "most right", chance])
    for task, content in found.items():
        seeds = counted(len(content["settings"]["seeds"]), "seed")
        for place, limit in enumerate(content["settings"]["frontier"]["limits"]):
            cells = [cell for measure in (LOSS, RIGHT) for cell in _leader(content, place, measure)]
            rows.append(f"| {task} ({seeds}) | {limit:g} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _leader(content: Mapping[str, Any], place: int, key: str) -> tuple[str, str]:
    found = leaders(content, place, key)
    if found is None:
        return "", ""
    best, alike = found
    method = next(each for each in content["methods"] if each["name"] == best)
    value = shown(method["frontier"]["within"][place]["one"][key], MEASURES[key][1])
    others = len(content["methods"]) - 1
    if len(content["settings"]["seeds"]) < 2:
        return f"`{best}` {value}", "one seed"
    named = ", ".join(f"`{name}`" for name in alike) if len(alike) <= 3 else f"{len(alike)} of {others}"
    return f"`{best}` {value}", named or "none"


def what_adds(contents: Contents) -> str:
    """A table of what each decision adds within each limit."""
    limits = limits_of(contents.values())
    rows = []
    for heading, levers in LEVERS.items():
        group = [_added_row(contents, lever, limits) for lever in levers]
        if any(group):
            rows += [f"| **{heading}** |" + " |" * (len(limits) + 1), *filter(None, group)]
    if not rows:
        return ""
    return "\n".join([WHAT_ADDS, *head(["", "over", *within(limits)]), *rows, ""])


WHAT_ADDS = f"""## What each decision adds

Differences of the loss on test rows within each limit (nats a token; below zero the first has learned more), and of the
right answers (points; GSM8K has none). ± is over runs, from {ENOUGH_SETTINGS} settings on over settings, in bold where
it leaves out zero: over runs it says nothing of other tasks and models. What is known by the rate alone is known of the
first seed.
"""


def _added_row(contents: Contents, lever: Lever, limits: Sequence[float]) -> str:
    cells, over = [], ""
    for limit in limits:
        loss = added(list(contents.values()), lever, limit, LOSS)
        right = added(list(contents.values()), lever, limit, RIGHT)
        over = over or (loss or {}).get("over", "")
        points = right and {name: right[name] and 100 * right[name] for name in ("mean", "half")}
        cells.append("; ".join(filter(None, (difference(loss, FORM), difference(points, "{:+.1f}")))))
    return f"| {lever.words} | {over} | {' | '.join(cells)} |" if any(cells) else ""


def on_the_dial(records: Sequence[Mapping[str, Any]]) -> str:
    """What the study of the dial says of choices, at one fixed rate each."""
    found, runs = on_dial(records), {tuple(each[name] for name in dial.RUN) for each in records}
    if not found:
        return ""
    limits = list(next(iter(found.values())))
    heads = ["", *(f"within {limit:g} nats" for limit in limits)]
    rows = head(heads)
    for words, each in found.items():
        cells = [
            f"{difference(loss, FORM)}; {difference(right, '{:+.1f}')} ({counted(len(loss['values']), 'run')})"
            for loss, right in each.values()
        ]
        rows.append(f"| {words} | {' | '.join(cells)} |")
    replayed = sum(run[dial.RUN.index("replay")] > 0 for run in runs)
    return "\n".join([ON_THE_DIAL.format(runs=len(runs), replayed=replayed), *rows, ""])


ON_THE_DIAL = """## SmolLM2-135M-Instruct (dequantized from 4 bit), at one rate a method

From {runs} runs of `python benchmarks/dial.py` ([its tables](dial.md#what-it-is-worth-on-a-real-model)), {replayed} of
them with replay: irony and SST-2, each method at a rate that wasn't tuned, scaled back with a scale a matrix.
Differences of the loss on 80 test rows, end token included (nats a token), and of the right answers (points), run by
run; ± is the 95% interval over runs, in bold where it leaves out zero.
"""


def on_dial(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[float, tuple[dict[str, Any], dict[str, Any]]]]:
    """Two methods -> limit -> differences of loss and of right answers (points) over the runs that have both."""
    found: dict[str, dict[float, Any]] = {}
    for ours, theirs in (("lowest_mlp", "lora"), ("lowest", "lora"), ("full", "lora")):
        for limit in sorted({each["limit"] for each in records if "limit" in each}):
            runs = dial_kept(records, limit)
            pairs = [
                (each, runs[(theirs, *key)])
                for (arm, *key), each in runs.items()
                if arm == ours and (theirs, *key) in runs
            ]
            if pairs:
                measures = (
                    over_seeds([factor * (one[name] - other[name]) for one, other in pairs])
                    for name, factor in (("loss", 1), ("accuracy", 100))
                )
                found.setdefault(f"`{ours}` against `{theirs}`", {})[limit] = tuple(measures)
    return found


def dial_kept(records: Sequence[Mapping[str, Any]], limit: float) -> dict[tuple, Mapping[str, Any]]:
    """(method, task, replay, seed) -> what is left within the limit by a scale a matrix, the base where nothing is."""
    found = {}
    for each in records:
        key = tuple(each[name] for name in ("arm", "task", "replay", "seed"))
        if each["mode"] == "base":
            base = each
        elif each.get("limit") == limit and each["asked"] == "per_matrix":
            found[key] = base if each["mode"] == "none" else each
    return found


def unknown(contents: Contents) -> str:
    """What the page can't say."""
    missing = [name for name in study_real.SETTINGS if name not in contents]
    few = [words_of(name) for name, each in contents.items() if len(each["settings"]["seeds"]) < 3]
    larger = [MODELS[model] for model in LARGER if not any(name.startswith(f"{model}-") for name in contents)]
    draws = max((len(each["settings"]["seeds"]) for each in contents.values()), default=0)
    lines = ["## What isn't known\n"]
    lines += (
        [f"- {len(missing)} of the {len(study_real.SETTINGS)} settings above: not measured yet."] if missing else []
    )
    lines += [f"- What more than a seed or two would say: {'; '.join(few)}."] if few else []
    lines += (
        [f"- {', '.join(larger)}: `python benchmarks/study_gpu.py` would measure them, on a GPU."] if larger else []
    )
    lines += [f"- What most random choices do: each seed draws its own, {draws} to a method."] if draws else []
    # a twin's runs are those of its setting
    edge, tuned = at_an_edge(without_twins(contents))
    lines += (
        [f"- What other rates do: of {tuned} best ones {edge} are the lowest or the highest of those tried."]
        if edge
        else []
    )
    lines += [
        f"- Whether longer runs than {study_real.STEPS} steps, other tasks or models a hundred times as large agree. "
        "Measure with `kappatune compare` before you believe it of yours.",
        "- What dequantizing from 4 bit changes: the models are not quite the published ones, nor are their κ.",
    ]
    return "\n".join(lines) + "\n"


def at_an_edge(contents: Contents) -> tuple[int, int]:
    """How many methods have their best rate at an end of the grid, and how many there are, over all settings."""
    found = [
        (each["learning_rate"], sorted(map(float, each["grid"])))
        for one in contents.values()
        for each in one["methods"]
    ]
    return sum(rate in (rates[0], rates[-1]) for rate, rates in found if rates), len(found)
