"""Rows and templates in; prompts, completions and choices out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from datasets import Dataset
from pydantic import AfterValidator

from kappatune_plugin.checks import did_you_mean
from kappatune_plugin.data.templates import Template, check_columns, parse_template
from kappatune_plugin.errors import KappaTuneError

# a label of this value is left out of the loss, by PyTorch's cross entropy and by transformers
IGNORED = -100


def prompt_completion(
    rows: Dataset,
    prompt: str,
    completion: str,
    labels: Mapping[Any, str] | None = None,
    label_column: str = "label",
) -> Dataset:
    """Rows in TRL's prompt-completion format (columns `prompt` and `completion`), whose loss is on the completion.

    Args:
        prompt, completion: templates of plain {column} names.
        labels: value of `label_column` -> the word that templates show for it; keys may be numbers or strings.

    Raises:
        KappaTuneError: a template that can't be read or names a missing column, a label without a word, a row
            without a value.
    """
    filled = pairs(rows, prompt, completion, labels, label_column)
    from datasets import Dataset

    prompts, completions = ([pair[side] for pair in filled] for side in (0, 1))
    return Dataset.from_dict({"prompt": prompts, "completion": completions})


def pairs(
    rows: Dataset,
    prompt: str,
    completion: str,
    labels: Mapping[Any, str] | None = None,
    label_column: str = "label",
) -> list[tuple[str, str]]:
    """(prompt, completion) of every row; arguments and errors as `prompt_completion`."""
    templates = _templates(rows, prompt, completion, labels, label_column)
    return [tuple(each.fill(row) for each in templates) for row in _worded(rows, templates, labels, label_column)]


def choice_examples(
    rows: Dataset, prompt: str, completion: str, labels: Mapping[Any, str], label_column: str = "label"
) -> list["ChoiceExample"]:
    """One example for each row, to measure accuracy: the completion with each word of `labels`, in their order.

    Raises:
        KappaTuneError: as `prompt_completion`; also labels of fewer than two words, a completion that doesn't name
            the label, or a prompt that gives it away.
    """
    templates = prompt_template, completion_template = _templates(rows, prompt, completion, labels, label_column)
    words = _choices(labels)
    if label_column not in completion_template.columns or label_column in prompt_template.columns:
        raise KappaTuneError(
            f"With labels the completion shows the answer and the prompt doesn't: name {{{label_column}}} in the "
            f"completion only. Found prompt: {prompt!r}, completion: {completion!r}."
        )
    examples = []
    for row in _worded(rows, templates, labels, label_column):
        choices = tuple(completion_template.fill({**row, label_column: word}) for word in words)
        examples.append(ChoiceExample(prompt_template.fill(row), choices, words.index(row[label_column])))
    return examples


def own_pairs(rows: Dataset) -> list[tuple[Any, Any]] | None:
    """(prompt, completion) of rows in a format of TRL's: texts, or lists of messages; None for plain texts.

    The completion of a conversation (column `messages`) is its last message.

    Raises:
        KappaTuneError: a conversation that doesn't end with an answer of the assistant.
    """
    if {"prompt", "completion"} <= set(rows.column_names):
        return [(row["prompt"], row["completion"]) for row in rows]
    if "messages" not in rows.column_names:
        return None
    found = []
    for position, row in enumerate(rows):
        messages = row["messages"]
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise KappaTuneError(
                f"data.test: row {position} doesn't end with an answer of the assistant to a question: what would be "
                "measured is its last message. Leave such rows out."
            )
        found.append((messages[:-1], messages[-1:]))
    return found


def own_choices(pairs: Sequence[tuple[Any, Any]], labels: Mapping[Any, str]) -> list["ChoiceExample"]:
    """What `own_pairs` gives, each with all words of `labels` as the possible answers, in their order.

    Raises:
        KappaTuneError: labels of fewer than two words, or an answer that is none of them.
    """
    words = _choices(labels)
    found = []
    for position, (prompt, completion) in enumerate(pairs):
        texts = isinstance(completion, str)
        answer = completion if texts else completion[0]["content"]
        if answer not in words:
            raise KappaTuneError(
                f"labels: the answer of row {position} of data.test is {answer!r:.200}, which is none of "
                f"{', '.join(map(repr, words))}. Add it to labels, or leave labels out: then the loss is measured."
            )
        choices = tuple(words) if texts else tuple([{**completion[0], "content": word}] for word in words)
        found.append(ChoiceExample(prompt, choices, words.index(answer)))
    return found


def _check_labels(labels: Any) -> Any:
    if labels is None:
        return None
    if isinstance(labels, list) and labels and all(isinstance(word, str | bool | int | float) for word in labels):
        labels = {word: word for word in labels}
    if not isinstance(labels, Mapping) or not labels:
        raise KappaTuneError(f"expected a mapping such as {{0: 'no', 1: 'yes'}}, found {labels!r}.")
    problems = []
    for value, word in labels.items():
        if isinstance(word, bool):
            problems.append(f"YAML reads a bare yes or no as true or false: quote the word of {value!r}.")
        elif not isinstance(word, str | int | float):
            problems.append(f"the word of {value!r} is {word!r}; expected a text.")
    if problems:
        raise KappaTuneError("\n".join(problems))
    return labels


# `labels` of a recipe: a mapping from values to words, or None; a list names words that stand for themselves
Labels = Annotated[Any, AfterValidator(_check_labels)]


def _choices(labels: Mapping[Any, str]) -> list[str]:
    # values that share a word are one choice
    words = list(dict.fromkeys(str(word) for word in labels.values()))
    if len(words) < 2:
        raise KappaTuneError(f"labels: {dict(labels)} leave no choice. Give at least two words.")
    return words


def _templates(
    rows: Dataset, prompt: str, completion: str, labels: Mapping[Any, str] | None, label_column: str
) -> tuple[Template, Template]:
    parsed = []
    for what, text in (("prompt", prompt), ("completion", completion)):
        parsed.append(parse_template(text, what))
        check_columns(parsed[-1], what, rows.column_names)
    if not parsed[1].columns:
        raise KappaTuneError(f"completion: {completion!r} names no column: every row would teach the same text.")
    if labels and label_column not in rows.column_names:
        raise KappaTuneError(
            f"label_column: the rows have no column '{label_column}'.{did_you_mean(label_column, rows.column_names)} "
            f"Columns: {', '.join(rows.column_names)}. Give label_column, or remove labels."
        )
    return parsed[0], parsed[1]


def _worded(
    rows: Dataset, templates: tuple[Template, Template], labels: Mapping[Any, str] | None, label_column: str
) -> Iterator[dict[str, Any]]:
    """The rows with the columns that the templates need, and with words instead of label values."""
    needed = {column for template in templates for column in template.columns}
    words = {_label_key(value): str(word) for value, word in (labels or {}).items()}
    columns = sorted(needed | ({label_column} if words else set()))
    for position, row in enumerate(rows.select_columns(columns)):
        for column, value in row.items():
            if value is None or isinstance(value, list | dict):
                kind = "no value" if value is None else f"a {type(value).__name__}"
                raise KappaTuneError(
                    f"Row {position} has {kind} in column '{column}'; a template takes text or numbers."
                )
        if words:
            found = row[label_column]
            if _label_key(found) not in words:
                raise KappaTuneError(
                    f"labels: row {position} has {label_column} = {found!r}, which labels ({', '.join(words)}) "
                    f"don't name. Write labels: {{..., {found}: WORD}}."
                )
            row[label_column] = words[_label_key(found)]
        yield row


def _label_key(value: Any) -> str:
    """The same key for 1, 1.0 and "1", since YAML, CSV and JSON read labels differently."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


@dataclass(frozen=True)
class ChoiceExample:
    """A question and its possible answers, texts or lists of messages; `answer` is the index of the right one."""

    prompt: Any
    choices: Sequence[Any]
    answer: int
